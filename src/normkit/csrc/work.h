// What the kernels are told: the shape of the work and where its numbers lie. Nothing here depends on the instruction
// set, on Python or on torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace normkit {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

enum class Type : int { f32, bf16, f16, f64 };

// The last one is for backward passes only: x is not the input of the norm but what a leaky ReLU behind it gave, and mean,
// rstd and weight are those of the value before that ReLU.
enum class Activation : int { none, relu, leaky_relu, silu, gelu, gelu_tanh, leaky_relu_output };

// The tensor as three axes: n samples, c channels, s positions of space; or, for rows, n rows of c elements.
enum class Shape : int {
    planes,   // (n, c, s), a channel's values of one sample lie together: batch, group and instance norm
    columns,  // (n, s, c), the channels of one position lie together: the same norms
    rows,     // (n, c), one statistic per row: layer and RMS norm; group norm without space
    tiles,    // (n, c, s), one statistic per sample and position: layer and RMS norm over channels
};

// Steps of a pass. Both: one fused pass. One alone: for statistics that are merged or exchanged in between.
enum Step : int { first = 1, second = 2, fused = 3 };

struct Work {
    Shape shape;
    Type type;
    Type weight_type;
    Activation activation;
    double slope;   // of a leaky ReLU
    bool residual;  // added after the affine step, before the activation
    bool center;    // subtract the mean; otherwise the mean counts as zero
    bool batch;     // statistics from the input; otherwise they are given
    int64_t n, c, s;
    int64_t groups;  // statistics per sample; 0: one statistic per channel over all samples. rows: the weight's period

    int64_t elements() const { return n * c * s; }
    int64_t statistics() const {
        switch (shape) {
            case Shape::rows: return n;
            case Shape::tiles: return n * s;
            default: return groups ? n * groups : c;
        }
    }
    int64_t values() const { return elements() / (statistics() ? statistics() : 1); }  // behind one statistic
};

// Means, inverse deviations and sums are float, or double where x is double. Null: absent, or not wanted.
struct Forward {
    const void *x, *residual, *weight, *bias;
    void* y;
    uint8_t* bits;  // one bit per element: was it above zero before the ReLU
    void *mean, *rstd, *var;
    void *running_mean, *running_var;
    double momentum, eps;
    int steps, threads;
    bool stream;  // write y past the caches
};

struct Backward {
    const void *x, *dy, *residual, *weight, *bias, *mean, *rstd;
    const uint8_t* bits;
    void *dx, *dresidual, *dweight, *dbias;
    void *sum_dz, *sum_dz_x;  // per statistic: sum of dz, and of dz (x - mean); out of the first step, into the second
    double count;             // values behind one statistic, over all ranks
    int steps, threads;
    bool stream;
};

// One time step of an LSTM of n samples and h units, between its norms. (n, h) each, but for driven, recurrent and dsum,
// the gradient of their sum: (n, 4 h), the gates in the order i, f, g, o.
struct LstmStep {
    Type type;  // f32 or f64
    int64_t n, h;
    const void *driven, *recurrent, *before;  // before: the cell of the step before
    void *gates, *output, *cell;              // behind their activations: i, f and g in (n, 3 h), and o
    const void *dcell, *doutput;              // null: no gradient
    void *dsum, *dbefore;
    int threads;
};

// Bits of one run of `length` elements are padded to whole 16s, so that every run starts on a byte.
inline int64_t bit_bytes(int64_t length) { return (length + 15) / 16 * 2; }

// Columns narrower than this are handled several rows at a time, as if they were one wide row; with few rows the
// merging at the end would cost more than it saves.
inline int64_t rows_per_run(const Work& work) {
    const int64_t rows = work.groups ? work.s : work.n * work.s;
    const int64_t wanted = work.c >= 256 ? 1 : (511 + work.c) / work.c, most = rows / 64;
    return most < 1 ? 1 : wanted < most ? wanted : most;
}

int64_t bits_needed(const Work& work);

// Memory of this thread that lives from call to call; no kernel keeps anything in it. Slots do not overlap.
void* scratch(int slot, size_t bytes);

struct Kernels {
    const char* name;
    int types;  // that it has, as bits in the order of Type
    void (*planes_forward)(const Work&, const Forward&);
    void (*planes_backward)(const Work&, const Backward&);
    void (*columns_forward)(const Work&, const Forward&);
    void (*columns_backward)(const Work&, const Backward&);
    void (*rows_forward)(const Work&, const Forward&);
    void (*rows_backward)(const Work&, const Backward&);
    void (*tiles_forward)(const Work&, const Forward&);
    void (*tiles_backward)(const Work&, const Backward&);
    void (*lstm_forward)(const LstmStep&);
    void (*lstm_backward)(const LstmStep&);
};

const char* isa();  // the instruction set that this machine runs
void forward(const Work& work, const Forward& call);
void backward(const Work& work, const Backward& call);
void lstm_forward(const LstmStep& step);
void lstm_backward(const LstmStep& step);

}  // namespace normkit
