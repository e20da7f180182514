// The inner loops over one run of neighbouring elements. A coefficient is one number for the whole run, or one number
// per element. Everything else in this folder decides only which runs, in which order, on which thread.
#pragma once

#include <type_traits>

#include "activation.h"

namespace normkit::NORMKIT_ISA {

template <class T> INLINE Lanes<T> at(Number<T> value, int64_t) { return all(value); }
template <class T> INLINE Lanes<T> at(const Number<T>* values, int64_t i) { return load(values + i, Whole{}); }
// Arrays of coefficients are padded, so that the last register may be read whole.
constexpr int64_t kPadding = 16;

enum class Epilogue { none, relu, silu, other };
enum class Gate { none, relu, bits, silu, other };  // how the gradient before the activation is found

inline Epilogue epilogue_of(const Work& work) {
    if (work.activation == Activation::none) return Epilogue::none;
    if (work.activation == Activation::silu) return Epilogue::silu;
    return work.activation == Activation::relu ? Epilogue::relu : Epilogue::other;
}
inline Gate gate_of(const Work& work) {
    if (work.activation == Activation::none) return Gate::none;
    if (work.activation == Activation::relu) return work.residual ? Gate::bits : Gate::relu;
    if (work.activation == Activation::silu) return Gate::silu;
    return Gate::other;
}

template <Epilogue e, class V> INLINE V activated(V z, const Work& work, V slope) {
    if constexpr (e == Epilogue::none) return z;
    if constexpr (e == Epilogue::relu) return activated(z, Activation::relu, slope);
    if constexpr (e == Epilogue::silu) return activated(z, Activation::silu, slope);
    return activated(z, work.activation, slope);
}

template <Gate g, class V> INLINE V gated(V dz, V z, const Work& work, V slope) {
    if constexpr (g == Gate::relu) return z > 0 ? dz : V{};
    if constexpr (g == Gate::silu) return dz * derivative(z, Activation::silu, slope);
    if constexpr (g == Gate::other) return dz * derivative(z, work.activation, slope);
    return dz;
}

// y = activation(x * scale + shift + residual)
template <class T, class C> struct Apply {
    using Leaf = void (*)(const Work&, const T* x, const T* residual, T* y, uint8_t* bits, int64_t n, C scale, C shift);

    template <Epilogue e, bool residual>
    static void leaf(const Work& work, const T* x, const T* r, T* y, uint8_t* bits, int64_t n, C scale, C shift) {
        const Lanes<T> slope = all(static_cast<Number<T>>(work.slope));
        sweep<width<T>>(n, [&](int64_t i, auto m) __attribute__((always_inline)) {
            Lanes<T> z = load(x + i, m) * at<T>(scale, i) + at<T>(shift, i);
            if constexpr (residual) z += load(r + i, m);
            if constexpr (residual && e == Epilogue::relu)
                if (bits) put_bits(bits, i, above_zero(z), z);
            store(y + i, activated<e>(z, work, slope), m);
        });
    }

    static Leaf pick(const Work& work) {
        switch (epilogue_of(work)) {
            case Epilogue::none: return work.residual ? leaf<Epilogue::none, true> : leaf<Epilogue::none, false>;
            case Epilogue::relu: return work.residual ? leaf<Epilogue::relu, true> : leaf<Epilogue::relu, false>;
            case Epilogue::silu: return work.residual ? leaf<Epilogue::silu, true> : leaf<Epilogue::silu, false>;
            default: return work.residual ? leaf<Epilogue::other, true> : leaf<Epilogue::other, false>;
        }
    }
};

// dz = dy through the activation; dx = dz * p + x * q + r
template <class T, class C> struct Gradient {
    struct Coefficients {
        C p, q, r, scale, shift;
    };
    using Leaf = void (*)(const Work&, const T* x, const T* dy, const T* residual, const uint8_t* bits, T* dx,
                          T* dresidual, int64_t n, Coefficients c);

    template <Gate g>
    static void leaf(const Work& work, const T* x, const T* dy, const T* r, const uint8_t* bits, T* dx, T* dr,
                     int64_t n, Coefficients c) {
        const Lanes<T> slope = all(static_cast<Number<T>>(work.slope));
        sweep<width<T>>(n, [&](int64_t i, auto m) __attribute__((always_inline)) {
            const Lanes<T> v = load(x + i, m);
            Lanes<T> dz = load(dy + i, m);
            if constexpr (g == Gate::bits) {
                dz = where(get_bits(bits, i, dz), dz);
            } else if constexpr (g != Gate::none) {
                Lanes<T> z = v * at<T>(c.scale, i) + at<T>(c.shift, i);
                if constexpr (g == Gate::other || g == Gate::silu)
                    if (r) z += load(r + i, m);
                dz = gated<g>(dz, z, work, slope);
            }
            if (dx) store(dx + i, dz * at<T>(c.p, i) + (v * at<T>(c.q, i) + at<T>(c.r, i)), m);
            if (dr) store(dr + i, dz, m);
        });
    }

    static Leaf pick(const Work& work) {
        switch (gate_of(work)) {
            case Gate::none: return leaf<Gate::none>;
            case Gate::relu: return leaf<Gate::relu>;
            case Gate::bits: return leaf<Gate::bits>;
            case Gate::silu: return leaf<Gate::silu>;
            default: return leaf<Gate::other>;
        }
    }
};

// Sums over a run with one coefficient: of dz and of dz (x - mean).
template <class T> struct RunSums {
    using Leaf = void (*)(const Work&, const T* x, const T* dy, const T* residual, const uint8_t* bits, int64_t n,
                          Number<T> mean, Number<T> scale, Number<T> shift, Lanes<T>* sums);

    template <Gate g>
    static void leaf(const Work& work, const T* x, const T* dy, const T* r, const uint8_t* bits, int64_t n,
                     Number<T> mean, Number<T> scale, Number<T> shift, Lanes<T>* sums) {
        const Lanes<T> slope = all(static_cast<Number<T>>(work.slope));
        Lanes<T> one[4]{}, two[4]{};
        sweep4<width<T>>(n, [&](int64_t i, auto m, int k) __attribute__((always_inline)) {
            const Lanes<T> v = load(x + i, m);
            Lanes<T> dz = load(dy + i, m);
            if constexpr (g == Gate::bits) {
                dz = where(get_bits(bits, i, dz), dz);
            } else if constexpr (g != Gate::none) {
                Lanes<T> z = v * scale + shift;
                if constexpr (g == Gate::other || g == Gate::silu)
                    if (r) z += load(r + i, m);
                dz = gated<g>(dz, z, work, slope);
            }
            one[k] += dz;
            two[k] += dz * (v - mean);
        });
        sums[0] += (one[0] + one[1]) + (one[2] + one[3]);
        sums[1] += (two[0] + two[1]) + (two[2] + two[3]);
    }

    static Leaf pick(const Work& work) {
        switch (gate_of(work)) {
            case Gate::none: return leaf<Gate::none>;
            case Gate::relu: return leaf<Gate::relu>;
            case Gate::bits: return leaf<Gate::bits>;
            case Gate::silu: return leaf<Gate::silu>;
            default: return leaf<Gate::other>;
        }
    }
};

// Adds to sums: x - shift, and its square.
template <class T> void run_moments(const T* x, int64_t n, Number<T> shift, Lanes<T>* sums) {
    Lanes<T> one[4]{}, two[4]{};
    sweep4<width<T>>(n, [&](int64_t i, auto m, int k) __attribute__((always_inline)) {
        const Lanes<T> d = only(load(x + i, m) - shift, m);
        one[k] += d;
        two[k] += d * d;
    });
    sums[0] += (one[0] + one[1]) + (one[2] + one[3]);
    sums[1] += (two[0] + two[1]) + (two[2] + two[3]);
}

template <class T> double run_sum(const T* x, int64_t n) {
    Lanes<T> sum[4]{};
    sweep4<width<T>>(n, [&](int64_t i, auto m, int k) __attribute__((always_inline)) { sum[k] += load(x + i, m); });
    return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace normkit::NORMKIT_ISA
