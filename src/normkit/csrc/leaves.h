// The inner loops over runs of neighbouring elements. There is one coefficient per run, or one per element of a single run.
// Everything else in this folder decides only which runs, in which order, on which thread.
#pragma once

#include <type_traits>

#include "activation.h"

namespace normkit::NORMKIT_ISA {

// How many elements a coefficient belongs to. Arrays with one per element are padded, so that the last register may be read
// whole.
enum class Per { run, element };
constexpr int64_t kPadding = 16;

template <class T, Per per> struct Coefficient {
    INLINE Coefficient(const Number<T>* from, int64_t run) : from(from) {
        if constexpr (per == Per::run) value = all(from[run]);
    }
    INLINE Lanes<T> operator()(int64_t i) const {
        if constexpr (per == Per::run) return value;
        return load(from + i, Whole{});
    }
    const Number<T>* from;
    Lanes<T> value;
};

// What a loop knows while it is compiled. `any` knows nothing and looks for every register; that branch always goes the
// same way. float64 and float16 have no other loop, but for a norm with nothing behind it; a baseline that stands beside
// better instruction sets has no other loop at all.
enum class Epilogue { none, relu, silu, any };
enum class Gate { none, relu, bits, output, silu, any };  // how the gradient before the activation is found
#if defined(NORMKIT_LEAN)
template <class T> constexpr int kEffort = 0;
#else
template <class T> constexpr int kEffort = std::is_same_v<T, float> || std::is_same_v<T, bf16> ? 2 : 1;
#endif
template <class T, auto own> constexpr bool kHasOwn = kEffort<T> >= (own == decltype(own)::none ? 1 : 2);

inline Epilogue epilogue_of(const Work& work) {
    switch (work.activation) {
        case Activation::none: return Epilogue::none;
        case Activation::relu: return Epilogue::relu;
        case Activation::silu: return Epilogue::silu;
        default: return Epilogue::any;
    }
}
inline Gate gate_of(const Work& work) {
    switch (work.activation) {
        case Activation::none: return Gate::none;
        case Activation::relu: return work.residual ? Gate::bits : Gate::relu;
        case Activation::leaky_relu_output: return Gate::output;
        case Activation::silu: return Gate::silu;
        default: return Gate::any;
    }
}

// The loop for `wanted` among those that are compiled: pick(constant) of it where it is one of `own`, or else of `any`.
template <class E, E value> using Constant = std::integral_constant<E, value>;
template <class T, class E, E own, class Leaf, class Pick> void take(E wanted, Leaf& found, Pick pick) {
    if constexpr (kHasOwn<T, own>)
        if (wanted == own) found = pick(Constant<E, own>{});
}
template <class T, Epilogue... own, class Pick> auto for_epilogue(const Work& work, Pick pick) {
    auto found = pick(Constant<Epilogue, Epilogue::any>{});
    (take<T, Epilogue, own>(epilogue_of(work), found, pick), ...);
    return found;
}
template <class T, Gate... own, class Pick> auto for_gate(const Work& work, Pick pick) {
    auto found = pick(Constant<Gate, Gate::any>{});
    (take<T, Gate, own>(gate_of(work), found, pick), ...);
    return found;
}

template <Epilogue e, class V> INLINE V activated(V z, Activation kind, V slope) {
    if constexpr (e == Epilogue::none) return z;
    if constexpr (e == Epilogue::relu) return activated(z, Activation::relu, slope);
    if constexpr (e == Epilogue::silu) return z * factor(z);
    return activated(z, kind, slope);
}

template <Gate g, class V> INLINE V gated(V dy, V z, Activation kind, V slope) {
    if constexpr (g == Gate::relu) return z > 0 ? dy : V{};
    if constexpr (g == Gate::silu) return dy * silu_derivative(z);
    return gated(dy, z, kind, slope);
}

// Whether finding dz takes so long that it is worth writing down between two passes.
template <Gate g> constexpr bool kCurved = g == Gate::silu || g == Gate::any;
inline bool curved(const Work& work) {
    return work.activation >= Activation::silu && work.activation <= Activation::gelu_tanh;
}

// v = x, and dz = dy through the activation of z = x * scale + shift + residual, for the elements from `at` on, whose bits
// begin at `bit`.
template <Gate g, class T, class D, class M>
INLINE void look(Activation kind, const T* x, const D* dy, const T* r, int64_t at, const uint8_t* bits, int64_t bit,
                 M m, Lanes<T> scale, Lanes<T> shift, Lanes<T> slope, Lanes<T>& v, Lanes<T>& dz) {
    v = load(x + at, m);
    dz = load(dy + at, m);
    if constexpr (g == Gate::none) return;
    if (g == Gate::bits || (g == Gate::any && bits)) {
        dz = where(get_bits(bits, bit, dz), dz);
    } else if (g == Gate::output || (g == Gate::any && kind == Activation::leaky_relu_output)) {
        dz = v > 0 ? dz : dz * slope;
        v = v > 0 ? v : v * (1 / slope);
    } else {
        Lanes<T> z = v * scale + shift;
        if constexpr (g == Gate::any || g == Gate::silu)
            if (r) z += load(r + at, m);
        dz = gated<g>(dz, z, kind, slope);
    }
}

// y = activation(x * scale + shift + residual), for `runs` runs of n elements each, side by side.
template <class T, Per per> struct Apply {
    using N = Number<T>;
    using Leaf = void (*)(const Work&, const T* x, const T* residual, T* y, uint8_t* bits, int64_t runs, int64_t n,
                          const N* scale, const N* shift);

    template <Epilogue e, bool residual>
    static void leaf(const Work& work, const T* x, const T* r, T* y, uint8_t* bits, int64_t runs, int64_t n,
                     const N* scale, const N* shift) {
        const Lanes<T> slope = all(static_cast<N>(work.slope));
        const Activation kind = work.activation;
        for (int64_t run = 0; run < runs; ++run) {
            const Coefficient<T, per> a(scale, run), b(shift, run);
            sweep<width<T>, e != Epilogue::any>(n, [&](int64_t i, auto m) __attribute__((always_inline)) {
                Lanes<T> z = load(x + i, m) * a(i) + b(i);
                if constexpr (residual) z += load(r + i, m);
                if constexpr (residual && (e == Epilogue::relu || e == Epilogue::any))
                    if (bits) put_bits(bits, i, above_zero(z), z);
                store(y + i, activated<e>(z, kind, slope), m);
            });
            x += n, y += n;
            if constexpr (residual) r += n;
            if (bits) bits += bit_bytes(n);
        }
    }

    static Leaf pick(const Work& work) {
        return for_epilogue<T, Epilogue::none, Epilogue::relu, Epilogue::silu>(work, [&](auto e) -> Leaf {
            constexpr Epilogue own = decltype(e)::value;
            return work.residual ? leaf<own, true> : leaf<own, false>;
        });
    }
};

// dz = dy through the activation; dx = dz * p + x * q + r. `D`: what dy is stored as.
template <class T, Per per, class D = T> struct Gradient {
    using N = Number<T>;
    struct Coefficients {
        const N *p, *q, *r, *scale, *shift;
    };
    using Leaf = void (*)(const Work&, const T* x, const D* dy, const T* residual, const uint8_t* bits, T* dx,
                          T* dresidual, int64_t runs, int64_t n, Coefficients c);

    template <Gate g>
    static void leaf(const Work& work, const T* x, const D* dy, const T* r, const uint8_t* bits, T* dx, T* dr,
                     int64_t runs, int64_t n, Coefficients c) {
        const Lanes<T> slope = all(static_cast<N>(work.slope));
        const Activation kind = work.activation;
        for (int64_t run = 0; run < runs; ++run) {
            const Coefficient<T, per> cp(c.p, run), cq(c.q, run), cr(c.r, run), scale(c.scale, run), shift(c.shift, run);
            sweep<width<T>, g != Gate::any>(n, [&](int64_t i, auto m) __attribute__((always_inline)) {
                Lanes<T> v, dz;
                look<g>(kind, x, dy, r, i, bits, i, m, scale(i), shift(i), slope, v, dz);
                if (dx) store(dx + i, dz * cp(i) + (v * cq(i) + cr(i)), m);
                if (dr) store(dr + i, dz, m);
            });
            x += n, dy += n;
            if (r) r += n;
            if (dx) dx += n;
            if (dr) dr += n;
            if (bits) bits += bit_bytes(n);
        }
    }

    static Leaf pick(const Work& work) {
        return for_gate<T, Gate::none, Gate::relu, Gate::bits, Gate::output, Gate::silu>(
            work, [](auto g) -> Leaf { return leaf<decltype(g)::value>; });
    }
};

// Sums over runs, one pair per run: of dz, and of dz (x - mean). dz is kept where `keep` points.
template <class T> struct RunSums {
    using N = Number<T>;
    using Sums = Lanes<T>[2];
    using Leaf = void (*)(const Work&, const T* x, const T* dy, const T* residual, const uint8_t* bits, N* keep,
                          int64_t runs, int64_t n, const N* mean, const N* scale, const N* shift, Sums* sums);

    template <Gate g>
    static void leaf(const Work& work, const T* x, const T* dy, const T* r, const uint8_t* bits, N* keep, int64_t runs,
                     int64_t n, const N* mean, const N* scale, const N* shift, Sums* sums) {
        const Lanes<T> slope = all(static_cast<N>(work.slope));
        const Activation kind = work.activation;
        for (int64_t run = 0; run < runs; ++run) {
            const Coefficient<T, Per::run> centre(mean, run), a(scale, run), b(shift, run);
            Lanes<T> one[4]{}, two[4]{};
            sweep_sums<width<T>, g != Gate::any>(n, [&](int64_t i, auto m, int k) __attribute__((always_inline)) {
                Lanes<T> v, dz;
                look<g>(kind, x, dy, r, i, bits, i, m, a(i), b(i), slope, v, dz);
                if constexpr (kCurved<g>)
                    if (keep) store(keep + i, dz, m);
                one[k] += dz;
                two[k] += dz * (v - centre(i));
            });
            sums[run][0] += (one[0] + one[1]) + (one[2] + one[3]);
            sums[run][1] += (two[0] + two[1]) + (two[2] + two[3]);
            x += n, dy += n;
            if (r) r += n;
            if (keep) keep += n;
            if (bits) bits += bit_bytes(n);
        }
    }

    static Leaf pick(const Work& work) {
        return for_gate<T, Gate::none, Gate::relu, Gate::bits, Gate::output, Gate::silu>(
            work, [](auto g) -> Leaf { return leaf<decltype(g)::value>; });
    }
};

// Adds to the sums of each run: x - shift, and its square.
template <class T> void run_moments(const T* x, int64_t runs, int64_t n, const Number<T>* shift, Lanes<T> (*sums)[2]) {
    for (int64_t run = 0; run < runs; ++run, x += n) {
        Lanes<T> one[4]{}, two[4]{};
        const Lanes<T> around = all(shift[run]);
        sweep_sums<width<T>>(n, [&](int64_t i, auto m, int k) __attribute__((always_inline)) {
            const Lanes<T> d = only(load(x + i, m) - around, m);
            one[k] += d;
            two[k] += d * d;
        });
        sums[run][0] += (one[0] + one[1]) + (one[2] + one[3]);
        sums[run][1] += (two[0] + two[1]) + (two[2] + two[3]);
    }
}

template <class T> double run_sum(const T* x, int64_t n) {
    Lanes<T> sum[4]{};
    sweep_sums<width<T>>(n, [&](int64_t i, auto m, int k) __attribute__((always_inline)) { sum[k] += load(x + i, m); });
    return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace normkit::NORMKIT_ISA
