import torch

from torchinfer import kernels


def test_each_token_lands_in_its_slot_and_nothing_else_changes():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3, 5, 7, generator=generator)
    cache = torch.full((2, 4, 8, 5, 7), torch.nan)
    slot = torch.tensor([9, 31, 8], dtype=torch.int32)
    assert kernels.write_kv_pages(key, value, cache, slot).data_ptr() == cache.data_ptr()
    flat = cache.view(2, 32, 5, 7)
    assert torch.equal(flat[0, slot], key)
    assert torch.equal(flat[1, slot], value)
    assert flat.isnan().sum() == flat.numel() - 2 * key.numel()


def test_padded_tokens_share_slot_zero():
    key = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    cache = torch.zeros(2, 2, 4, 2, 3)
    kernels.write_kv_pages(key, key, cache, torch.tensor([5, 0, 0, 0], dtype=torch.int32))
    assert torch.equal(cache[0, 1, 1], key[0])
    assert cache[:, 1, [0, 2, 3]].count_nonzero() == 0
