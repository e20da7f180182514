// What follows the affine step: an activation, and what it does to the gradient.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace normkit::NORMKIT_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^(x rate), for |x rate| <= 126. What rounding the rate adds is 2e-8 |x| at most (6e-8 |x| where there is no FMA).
#if defined(__AVX512F__)
// 2^(n / 32) 2^f with |f| <= 1/64: the first by looking it up, the second by a polynomial whose greatest relative error is
// 5e-8. Two registers hold the table. From entry i the bits are taken away that i itself has in an exponent, once the
// rounded number is shifted to where exponents stand: one addition then does both.
alignas(64) constexpr uint32_t kPowers[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0,
    0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf,
    0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf,
    0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
INLINE Floats power(Floats x, float rate) {
    const float kRound = 393216.0f;  // 1.5 * 2^18: adding it rounds to n / 32, and n stands in the low bits
    const Floats rounded = x * rate + kRound;
    const Floats f = x * rate - (rounded - kRound);
    const Ints whole = (Ints)_mm512_permutex2var_epi32(_mm512_load_si512(kPowers), (__m512i)rounded,
                                                       _mm512_load_si512(kPowers + 16)) +
                       ((Ints)rounded << 18);
    return (Floats)whole * ((f * 0.240226507f + 0.693157344f) * f + 1.0f);
}
#else
// 2^n 2^f with |f| <= 1/2, and for 2^f the polynomial that is 1 at 0 and whose greatest relative error is least, 1.1e-7.
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
#endif
INLINE Floats exp(Floats x) { return power(between(-87.0f, x, 87.0f), kLog2E); }
INLINE Doubles exp(Doubles x) {
    for (int i = 0; i < kDoubles; ++i) x[i] = std::exp(x[i]);
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

// The share of a normal distribution below z, and its bell e^(-z z / 2). Below -|z| is half of erfc(|z| / sqrt(2)), which is
// the bell times t P(t) with t = 1 / (1 + 0.4 |z| / sqrt(2)): a polynomial fitted for the least relative error, 1.3e-7. At
// +-13 the share is 0 or 1 in float32.
INLINE Floats below(Floats z, Floats& bell) {
    const Floats x = between(-13.0f, z, 13.0f), t = inverse(1.0f + (x < 0.0f ? -x : x) * 0.282842712f);
    bell = power(x * x, -0.5f * kLog2E);
    Floats p = all(0.050262268632650375f);
    for (float c : {-0.1829020231962204f, 0.16908633708953857f, -0.005608310457319021f, 0.1414318084716797f,
                    0.16854187846183777f, 0.20784270763397217f, 0.22566959261894226f, 0.22567586600780487f})
        p = p * t + c;
    const Floats tail = t * p * bell * 0.5f;
    return x < 0.0f ? tail : 1.0f - tail;
}
INLINE Doubles below(Doubles z, Doubles& bell) {
    bell = exp(z * z * -0.5);
    for (int i = 0; i < kDoubles; ++i) z[i] = 0.5 * std::erfc(z[i] * -0.70710678118654752440);
    return z;
}

INLINE Floats sigmoid(Floats x) { return inverse(1 + power(between(-87.0f, x, 87.0f), -kLog2E)); }
INLINE Doubles sigmoid(Doubles x) { return 1 / (1 + exp(-x)); }

// The sigmoid of x for those who multiply it by x: NaN may become a number here, and becomes NaN again in the product.
INLINE Floats factor(Floats x) {
#if defined(__AVX512DQ__)
    const int nearer_to_zero = 2;  // takes the sign of x and the lesser magnitude, in one instruction instead of two
    return inverse(1 + power((Floats)_mm512_range_ps((__m512)x, (__m512)all(87.0f), nearer_to_zero), -kLog2E));
#else
    return sigmoid(x);
#endif
}
INLINE Doubles factor(Doubles x) { return sigmoid(x); }

template <class V> using Lane = std::decay_t<decltype(std::declval<V>()[0])>;

// The curved ones stay out of line: written into every loop, they would be most of the program.
template <class V> __attribute__((noinline)) V curved(V z, Activation kind) {
    using N = Lane<V>;
    constexpr N cube = N(0.044715), steep = N(1.5957691216057308);
    V bell;
    if (kind == Activation::silu) return z * factor(z);
    if (kind == Activation::gelu) return z * below(z, bell);
    return z * sigmoid((z + z * z * z * cube) * steep);
}

template <class V> INLINE V silu_derivative(V z) {
    const V s = factor(z);
    return s + s * (z - z * s);
}
template <class V> __attribute__((noinline)) V curved_derivative(V z, Activation kind) {
    using N = Lane<V>;
    constexpr N peak = N(0.39894228040143267794), cube = N(0.044715), steep = N(1.5957691216057308);
    if (kind == Activation::silu) return silu_derivative(z);
    if (kind == Activation::gelu) {
        V bell;
        const V share = below(z, bell);
        return share + z * bell * peak;
    }
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
