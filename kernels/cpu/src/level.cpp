// Compiled once for each level of instruction sets, with its flags, into the namespace TORCHINFER_LEVEL. Nothing of the
// standard library's templates may come in here: the linker would keep one copy of them, perhaps that with the newest
// instructions, for all levels. So each file is in the level's namespace, and all but the table has internal linkage.
#include "isa.h"
#include "types.h"
#include "vector.h"
//
#include "activation.h"
#include "attention.h"
#include "layer.h"
#include "layer_norm.h"
#include "linear.h"
#include "measure.h"
#include "quantize.h"
#include "rms_norm.h"
#include "rotary.h"
#include "sample.h"
#include "write_kv.h"

namespace torchinfer::TORCHINFER_LEVEL {

extern const Kernels table;
const Kernels table = {
    rms_norm,
    layer_norm,
    linear,
    measure_read,
    measure_products,
    attention,
    write_kv,
    quantize,
    rotary,
    gated_activation,
    attention_layer,
    mlp_layer,
    sample,
};

}  // namespace torchinfer::TORCHINFER_LEVEL
