// Statistics per position, a weight per channel, the positions of one channel side by side: layer and RMS norm over the
// channels of (n, c, s). A thread owns a few registers of neighbouring positions and walks down the channels; no
// transposed copy is ever made.
#include <omp.h>

#include "moments.h"
#include "output.h"
#include "weights.h"

namespace normkit::NORMKIT_ISA {
namespace {

constexpr int kWide = kFloats == 16 ? 8 : 4;  // registers of positions in one tile

template <class N> const N* widened(const void* from, const Work& work, int slot, double absent) {
    N* out = static_cast<N*>(scratch(slot, sizeof(N) * static_cast<size_t>(work.c)));
    for (int64_t c = 0; c < work.c; ++c) out[c] = static_cast<N>(read(from, work.weight_type, c, absent));
    return out;
}

// Calls body(sample, first position, number of positions, thread) for every tile of this thread.
template <class T, class Body> void divide(const Work& work, int threads, Body body) {
    const int64_t tile = kWide * width<T>, per_sample = (work.s + tile - 1) / tile;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int me = omp_get_thread_num();
        const Range mine = share(work.n * per_sample, me, omp_get_num_threads());
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            const int64_t start = i % per_sample * tile;
            body(i / per_sample, start, work.s - start < tile ? work.s - start : tile, me);
        }
    }
}

// Calls step(register, offset, lanes) for the registers of one row of a tile. A whole tile has a constant number of
// them, so that their sums stay in registers.
template <class T, class Step> INLINE void over(int64_t n, Step step) {
    if (n == kWide * width<T>) {
        for (int k = 0; k < kWide; ++k) step(k, k * width<T>, Whole{});
        return;
    }
    int k = 0;
    for (; (k + 1) * width<T> <= n; ++k) step(k, k * width<T>, Whole{});
    if (k * width<T> < n) step(k, k * width<T>, Part{static_cast<int>(n - k * width<T>)});
}

template <class T>
void statistics(const Work& work, const T* x, int64_t n, double eps, Lanes<T>* mean, Lanes<T>* rstd) {
    using N = Number<T>;
    using V = Lanes<T>;
    const N share = N(1) / static_cast<N>(work.c);
    V sum[kWide]{}, rest[kWide]{}, square[kWide]{};
    if (work.center)
        for (int64_t c = 0; c < work.c; ++c)
            over<T>(n, [&](int k, int64_t at, auto m)
                           __attribute__((always_inline)) { sum[k] += load(x + c * work.s + at, m); });
    for (int k = 0; k < kWide; ++k) mean[k] = sum[k] * share;
    for (int64_t c = 0; c < work.c; ++c)
        over<T>(n, [&](int k, int64_t at, auto m) __attribute__((always_inline)) {
            const V d = load(x + c * work.s + at, m) - mean[k];
            rest[k] += d;
            square[k] += d * d;
        });
    for (int k = 0; k < kWide; ++k) {
        const V correction = work.center ? rest[k] * share : V{};  // what the first mean missed by rounding
        V var = square[k] * share - correction * correction;
        var = var < 0 ? V{} : var;
        mean[k] += correction;
        for (int i = 0; i < width<T>; ++i) rstd[k][i] = N(1) / std::sqrt(var[i] + static_cast<N>(eps));
    }
}

template <class T, Epilogue e, bool residual> void forwards(const Work& work, const Forward& call) {
    using N = Number<T>;
    using V = Lanes<T>;
    const N *weight = widened<N>(call.weight, work, 0, 1), *bias = widened<N>(call.bias, work, 1, 0);
    const int64_t padded_bits = bit_bytes(work.s);
    divide<T>(work, call.threads, [&](int64_t sample, int64_t start, int64_t n, int) {
        const int64_t corner = sample * work.c * work.s + start;
        const T* x = static_cast<const T*>(call.x) + corner;
        const V slope = all(static_cast<N>(work.slope));
        const Activation kind = work.activation;
        V mean[kWide], rstd[kWide];
        statistics(work, x, n, call.eps, mean, rstd);
        over<T>(n, [&](int k, int64_t at, auto m) {
            put(static_cast<N*>(call.mean) + sample * work.s + start + at, mean[k], m);
            put(static_cast<N*>(call.rstd) + sample * work.s + start + at, rstd[k], m);
        });
        for (int64_t c = work.c; c-- > 0;) {
            const int64_t row = corner + c * work.s;
            uint8_t* bits = call.bits ? call.bits + (sample * work.c + c) * padded_bits : nullptr;
            over<T>(n, [&](int k, int64_t at, auto m) __attribute__((always_inline)) {
                V z = (load(x + c * work.s + at, m) - mean[k]) * rstd[k] * weight[c] + bias[c];
                if constexpr (residual)
                    if (call.residual) z += load(static_cast<const T*>(call.residual) + row + at, m);
                if constexpr (residual && (e == Epilogue::relu || e == Epilogue::any))
                    if (bits) put_bits(bits, start + at, above_zero(z), z);
                store(static_cast<T*>(call.y) + row + at, activated<e>(z, kind, slope), m);
            });
        }
    });
}

template <class T, Gate g> void backwards(const Work& work, const Backward& call) {
    using N = Number<T>;
    using V = Lanes<T>;
    const N *weight = widened<N>(call.weight, work, 0, 1), *bias = widened<N>(call.bias, work, 1, 0);
    const int64_t padded_bits = bit_bytes(work.s);
    const bool parameters = call.dweight || call.dbias;
    const size_t count = static_cast<size_t>(2 * work.c * call.threads);
    double* gathered = static_cast<double*>(scratch(2, sizeof(double) * count));
    for (size_t i = 0; i < count; ++i) gathered[i] = 0;
    divide<T>(work, call.threads, [&](int64_t sample, int64_t start, int64_t n, int me) {
        const int64_t corner = sample * work.c * work.s + start;
        const T *x = static_cast<const T*>(call.x) + corner, *dy = static_cast<const T*>(call.dy) + corner;
        const T* residual = call.residual ? static_cast<const T*>(call.residual) + corner : nullptr;
        const V slope = all(static_cast<N>(work.slope));
        const Activation kind = work.activation;
        V mean[kWide], rstd[kWide], one[kWide]{}, two[kWide]{};
        over<T>(n, [&](int k, int64_t at, auto m) {
            mean[k] = load(static_cast<const N*>(call.mean) + sample * work.s + start + at, m);
            rstd[k] = load(static_cast<const N*>(call.rstd) + sample * work.s + start + at, m);
        });
        const auto look = [&](int64_t c, int k, int64_t at, auto m, V& dz, V& hat) __attribute__((always_inline)) {
            const int64_t here = c * work.s + at;
            hat = (load(x + here, m) - mean[k]) * rstd[k];
            dz = load(dy + here, m);
            if constexpr (g == Gate::none) return;
            if (g == Gate::bits || (g == Gate::any && call.bits)) {
                dz = where(get_bits(call.bits + (sample * work.c + c) * padded_bits, start + at, dz), dz);
            } else {
                V z = hat * weight[c] + bias[c];
                if constexpr (g == Gate::any)
                    if (residual) z += load(residual + here, m);
                dz = gated<g>(dz, z, kind, slope);
            }
        };
        for (int64_t c = 0; c < work.c; ++c) {
            V to_weight{}, to_bias{};
            over<T>(n, [&](int k, int64_t at, auto m) __attribute__((always_inline)) {
                V dz, hat;
                look(c, k, at, m, dz, hat);
                to_bias += dz;
                to_weight += dz * hat;
                one[k] += dz * weight[c];
                two[k] += dz * weight[c] * hat;
            });
            if (!parameters) continue;
            gathered[(2 * me) * work.c + c] += total(to_weight);
            gathered[(2 * me + 1) * work.c + c] += total(to_bias);
        }
        if (!call.dx && !call.dresidual) return;
        const N share = N(1) / static_cast<N>(work.c);
        for (int k = 0; k < kWide; ++k) {
            one[k] = work.center ? one[k] * share : V{};
            two[k] *= share;
        }
        for (int64_t c = work.c; c-- > 0;)
            over<T>(n, [&](int k, int64_t at, auto m) __attribute__((always_inline)) {
                V dz, hat;
                look(c, k, at, m, dz, hat);
                const int64_t here = corner + c * work.s + at;
                if (call.dresidual) store(static_cast<T*>(call.dresidual) + here, dz, m);
                if (call.dx)
                    store(static_cast<T*>(call.dx) + here, (dz * weight[c] - one[k] - hat * two[k]) * rstd[k], m);
            });
    });
    for (int64_t c = 0; parameters && c < work.c; ++c) {
        double dw = 0, db = 0;
        for (int t = 0; t < call.threads; ++t) {
            dw += gathered[(2 * t) * work.c + c];
            db += gathered[(2 * t + 1) * work.c + c];
        }
        write(call.dweight, work.weight_type, c, dw);
        write(call.dbias, work.weight_type, c, db);
    }
}

template <class T> void forwards(const Work& work, const Forward& call) {
    const auto run = for_epilogue<T, Epilogue::none, Epilogue::relu>(work, [&](auto e) {
        constexpr Epilogue own = decltype(e)::value;
        if constexpr (own != Epilogue::any)
            if (!work.residual) return forwards<T, own, false>;
        return forwards<T, own, true>;
    });
    run(work, call);
}

template <class T> void backwards(const Work& work, const Backward& call) {
    const auto run = for_gate<T, Gate::none, Gate::relu, Gate::bits>(
        work, [](auto g) { return backwards<T, decltype(g)::value>; });
    run(work, call);
}

}  // namespace

void tiles_forward(const Work& work, const Forward& call) {
    by_type(work.type, [&](auto value) { forwards<decltype(value)>(work, call); });
}

void tiles_backward(const Work& work, const Backward& call) {
    by_type(work.type, [&](auto value) { backwards<decltype(value)>(work, call); });
}

}  // namespace normkit::NORMKIT_ISA
