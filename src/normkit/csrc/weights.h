// Numbers per channel: weights and their gradients, in whatever type the layer keeps them.
#pragma once

#include "lanes.h"

namespace normkit::NORMKIT_ISA {

inline double read(const void* from, Type type, int64_t i, double absent) {
    if (!from) return absent;
    switch (type) {
        case Type::f32: return static_cast<const float*>(from)[i];
        case Type::f64: return static_cast<const double*>(from)[i];
        case Type::f16: return widen_one(static_cast<const f16*>(from)[i]);
        case Type::bf16: break;
    }
    const uint32_t bits = static_cast<uint32_t>(static_cast<const bf16*>(from)[i].bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void write(void* to, Type type, int64_t i, double value) {
    if (!to) return;
    const float single = static_cast<float>(value);
    switch (type) {
        case Type::f32: static_cast<float*>(to)[i] = single; return;
        case Type::f64: static_cast<double*>(to)[i] = value; return;
        case Type::f16: static_cast<f16*>(to)[i].bits = narrow_one(f16{}, single); return;
        case Type::bf16: break;
    }
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const bool nan = single != single;
    static_cast<bf16*>(to)[i].bits = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// y = x * scale + shift
struct Affine {
    double scale, shift;
};
inline Affine affine(double mean, double rstd, double weight, double bias) {
    return {rstd * weight, bias - mean * rstd * weight};
}

// dx = dz * p + x * q + r, from the averages of dz w and dz w (x - mean) over the values behind one statistic.
struct Slopes {
    double p, q, r;
};
inline Slopes slopes(const Work& work, double mean, double rstd, double weight, double dz, double dz_x) {
    if (!work.batch) return {rstd * weight, 0, 0};
    const double q = -rstd * rstd * rstd * dz_x;
    return {rstd * weight, q, -q * mean - (work.center ? rstd * dz : 0)};
}

// running = (1 - momentum) * running + momentum * batch, with the unbiased variance
template <class N> void move_running(const Forward& call, int64_t i, double mean, double var, double count) {
    const double m = call.momentum;
    if (N* old = static_cast<N*>(call.running_mean)) old[i] = static_cast<N>((1 - m) * old[i] + m * mean);
    if (N* old = static_cast<N*>(call.running_var))
        old[i] = static_cast<N>((1 - m) * old[i] + m * var * (count / (count - 1)));
}

// The share of thread `i` of `n` things; shares are the same whenever the number of threads is.
struct Range {
    int64_t begin, end;
};
inline Range share(int64_t n, int i, int threads) { return {n * i / threads, n * (i + 1) / threads}; }

}  // namespace normkit::NORMKIT_ISA
