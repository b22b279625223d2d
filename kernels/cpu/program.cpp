// Ops recorded once and run again: a step of the model is one call from Python instead of hundreds.
#include <cstdint>

namespace {

// The arguments of every op begin with its number of rows, an int64, which is what changes from run to run.
struct Call {
    void (*op)(const void* args);
    int64_t* args;
};

}  // namespace

extern "C" void octavo_run_program(const void* calls, int64_t num_calls, int64_t rows) {
    for (int64_t i = 0; i < num_calls; i++) {
        const Call& call = ((const Call*)calls)[i];
        *call.args = rows;
        call.op(call.args);
    }
}
