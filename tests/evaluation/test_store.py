"""The file with the reference's logits."""

import shutil

import pytest
import torch

from torchinfer.errors import ConfigError
from torchinfer.evaluation.store import ReferenceStore, needed_bytes, space_problems


def test_float32_logits_come_back_as_they_were(tmp_path):
    logits = torch.randn(6, 50) * 20
    with ReferenceStore(6, 50, "float32", tmp_path) as store:
        store.write(4, logits[4:])
        store.write(0, logits[:4])
        assert torch.equal(store.read(0, 6), logits)
        assert torch.equal(store.read(3, 2), logits[3:5])


def test_float16_logits_keep_the_distribution_to_a_few_thousandths(tmp_path):
    logits = torch.randn(4, 50) * 20 + 300
    with ReferenceStore(4, 50, "float16", tmp_path) as store:
        store.write(0, logits)
        found, expected = torch.softmax(store.read(0, 4).double(), -1), torch.softmax(logits.double(), -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3)


def test_the_file_has_no_name_to_be_left_behind(tmp_path):
    with ReferenceStore(4, 50, "float32", tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_larger_than_the_disk_is_refused(tmp_path):
    size = needed_bytes(10**12, 1000, "float16")
    free = shutil.disk_usage(tmp_path).free
    assert size == 2 * 10**15 > free
    assert "2000000.00 GB" in space_problems(size, tmp_path)[0]
    with pytest.raises(ConfigError, match="scratch"):
        ReferenceStore(10**12, 1000, "float16", tmp_path)


def test_a_scratch_folder_that_is_not_there_is_refused(tmp_path):
    assert str(tmp_path / "nowhere") in space_problems(0, tmp_path / "nowhere")[0]
