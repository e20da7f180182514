// Which instruction set, and which family of kernels.
#include <cstdlib>
#include <cstring>
#include <new>

#include "work.h"

namespace normkit {

namespace baseline { extern const Kernels table; }
#if defined(NORMKIT_X86)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx512_bf16 { extern const Kernels table; }
#endif

namespace {

bool has(const char* isa) {
#if defined(NORMKIT_X86)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512cd");
    if (!std::strcmp(isa, "avx2")) return v3;
    if (!std::strcmp(isa, "avx512")) return v4;
    if (!std::strcmp(isa, "avx512_bf16")) return v4 && __builtin_cpu_supports("avx512bf16");
#endif
    return !std::strcmp(isa, "baseline");
}

// From the best to the one that every machine has; the last one has kernels for every type.
const Kernels* const kTables[] = {
#if defined(NORMKIT_X86)
    &avx512_bf16::table, &avx512::table, &avx2::table,
#endif
    &baseline::table,
};

// NORMKIT_ISA names one to use instead of the best; tests run the others this way. What this machine lacks is not asked.
const Kernels* const* best() {
    const char* asked = std::getenv("NORMKIT_ISA");
    const Kernels* const* table = kTables;
    while (table[0] != &baseline::table &&
           (!has(table[0]->name) || (asked && *asked && std::strcmp(asked, table[0]->name))))
        ++table;
    return table;
}

const Kernels* const* chosen() {
    static const Kernels* const* const table = best();
    return table;
}

const Kernels& kernels_for(Type type) {
    const Kernels* const* table = chosen();
    while (!(table[0]->types >> static_cast<int>(type) & 1)) ++table;
    return *table[0];
}

}  // namespace

const char* isa() { return chosen()[0]->name; }

void forward(const Work& work, const Forward& call) {
    const Kernels& k = kernels_for(work.type);
    switch (work.shape) {
        case Shape::planes: return k.planes_forward(work, call);
        case Shape::columns: return k.columns_forward(work, call);
        case Shape::rows: return k.rows_forward(work, call);
        case Shape::tiles: return k.tiles_forward(work, call);
    }
}

void backward(const Work& work, const Backward& call) {
    const Kernels& k = kernels_for(work.type);
    switch (work.shape) {
        case Shape::planes: return k.planes_backward(work, call);
        case Shape::columns: return k.columns_backward(work, call);
        case Shape::rows: return k.rows_backward(work, call);
        case Shape::tiles: return k.tiles_backward(work, call);
    }
}

void lstm_forward(const LstmStep& step) { kernels_for(step.type).lstm_forward(step); }
void lstm_backward(const LstmStep& step) { kernels_for(step.type).lstm_backward(step); }

int64_t bits_needed(const Work& work) {
    if (work.activation != Activation::relu || !work.residual) return 0;
    switch (work.shape) {
        case Shape::rows: return work.n * bit_bytes(work.c);
        case Shape::planes:
        case Shape::tiles: return work.n * work.c * bit_bytes(work.s);
        case Shape::columns: break;
    }
    const int64_t together = rows_per_run(work), rows = work.groups ? work.s : work.n * work.s;
    const int64_t section = rows / together * bit_bytes(together * work.c) + bit_bytes(rows % together * work.c);
    return section * (work.groups ? work.n : 1);
}

void* scratch(int slot, size_t bytes) {
    struct Slot {
        void* memory = nullptr;
        size_t size = 0;
        ~Slot() { std::free(memory); }
    };
    thread_local Slot slots[5];
    Slot& mine = slots[slot];
    if (mine.size < bytes) {
        std::free(mine.memory);
        mine.size = (bytes + 4095) / 4096 * 4096;
        mine.memory = std::aligned_alloc(64, mine.size);
        if (!mine.memory) {
            mine.size = 0;
            throw std::bad_alloc();
        }
    }
    return mine.memory;
}

}  // namespace normkit
