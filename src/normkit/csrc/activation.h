// What follows the affine step: an activation, and what it does to the gradient.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace normkit::NORMKIT_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^(x rate), for |x rate| <= 126: 2^n 2^f with |f| <= 1/2, and for 2^f the polynomial that is 1 at 0 and whose greatest
// relative error is least, 1.1e-7. What rounding the rate adds is 2e-8 |x| at most (6e-8 |x| where there is no FMA).
INLINE Floats power(Floats x, float rate) {
    const float kRound = 12583039.0f;  // 1.5 * 2^23 + 127: adding it rounds to n, whose exponent then stands in the low bits
    const Floats rounded = x * rate + kRound;
    const Floats f = x * rate - (rounded - kRound);
    Floats p = all(0.00132647273f);
    p = p * f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
    return p * (Floats)((Ints)rounded << 23);
}
INLINE Floats exp(Floats x) { return power(between(-87.0f, x, 87.0f), kLog2E); }
INLINE Doubles exp(Doubles x) {
    for (int i = 0; i < kDoubles; ++i) x[i] = std::exp(x[i]);
    return x;
}

// erfc by the rational Chebyshev fit of Numerical Recipes (erfcc): relative error below 1.2e-7, and that of e^(-x x).
INLINE Floats erfc(Floats x) {
    const Floats a = x < 0.0f ? -x : x;
    const Floats t = 1.0f / (1.0f + 0.5f * a);
    Floats p = all(0.17087277f);
    for (float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                    1.00002368f, -1.26551223f})
        p = p * t + c;
    const Floats tail = t * exp(p - a * a);
    return x < 0.0f ? 2.0f - tail : tail;
}
INLINE Doubles erfc(Doubles x) {
    for (int i = 0; i < kDoubles; ++i) x[i] = std::erfc(x[i]);
    return x;
}

// 1 / x for 1 <= x < 2^127. A division takes as long as everything around it; an estimate and a step of Newton's method are
// right to about one unit in the last place.
INLINE Floats inverse(Floats x) {
#if defined(__AVX512F__)
    const Floats near = (Floats)_mm512_rcp14_ps((__m512)x);
    return near + near * (1.0f - x * near);
#else
    return 1.0f / x;
#endif
}

INLINE Floats sigmoid(Floats x) { return inverse(1 + power(between(-87.0f, x, 87.0f), -kLog2E)); }
INLINE Doubles sigmoid(Doubles x) { return 1 / (1 + exp(-x)); }

template <class V> using Lane = std::decay_t<decltype(std::declval<V>()[0])>;

// The curved ones stay out of line: written into every loop, they would be most of the program.
template <class V> __attribute__((noinline)) V curved(V z, Activation kind) {
    using N = Lane<V>;
    constexpr N half = N(0.5), root = N(0.70710678118654752440), cube = N(0.044715), steep = N(1.5957691216057308);
    if (kind == Activation::silu) return z * sigmoid(z);
    if (kind == Activation::gelu) return z * half * erfc(z * -root);
    return z * sigmoid((z + z * z * z * cube) * steep);
}

template <class V> INLINE V silu_derivative(V z) {
    const V s = sigmoid(z);
    return s + s * (z - z * s);
}
template <class V> __attribute__((noinline)) V curved_derivative(V z, Activation kind) {
    using N = Lane<V>;
    constexpr N half = N(0.5), root = N(0.70710678118654752440), peak = N(0.39894228040143267794);
    constexpr N cube = N(0.044715), steep = N(1.5957691216057308);
    if (kind == Activation::silu) return silu_derivative(z);
    if (kind == Activation::gelu) return erfc(z * -root) * half + z * exp(z * z * -half) * peak;
    const V s = sigmoid((z + z * z * z * cube) * steep);
    return s + z * s * (1 - s) * (z * z * (3 * cube) + 1) * steep;
}

// NaN survives every one of these, as in torch.
template <class V> INLINE V activated(V z, Activation kind, V slope) {
    switch (kind) {
        case Activation::none: return z;
        case Activation::relu: return z < 0 ? V{} : z;
        case Activation::leaky_relu: return z > 0 ? z : z * slope;
        default: return curved(z, kind);
    }
}

// dz = dy times the derivative at z
template <class V> INLINE V gated(V dy, V z, Activation kind, V slope) {
    switch (kind) {
        case Activation::none: return dy;
        case Activation::relu: return z > 0 ? dy : V{};
        case Activation::leaky_relu: return z > 0 ? dy : dy * slope;
        default: return dy * curved_derivative(z, kind);
    }
}

}  // namespace normkit::NORMKIT_ISA
