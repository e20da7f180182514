// One register's worth of numbers. Every file that includes this is compiled once per instruction set, into a namespace
// of its own; `-march` decides what the loops below become.
//
// Arithmetic is GCC's and Clang's vector extension, so it reads like arithmetic. Intrinsics stand only where the
// extension has no word: half-precision conversions, partial loads, masks, and stores past the caches.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "work.h"

#define INLINE inline __attribute__((always_inline))

namespace normkit::NORMKIT_ISA {

#if defined(__AVX512F__)
constexpr int kFloats = 16;
#else
constexpr int kFloats = 8;
#endif
constexpr int kDoubles = 8;

typedef float Floats __attribute__((vector_size(4 * kFloats)));
typedef int32_t Ints __attribute__((vector_size(4 * kFloats)));
typedef uint32_t Words __attribute__((vector_size(4 * kFloats)));
typedef uint16_t Halves __attribute__((vector_size(2 * kFloats)));
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
typedef int64_t Longs __attribute__((vector_size(8 * kDoubles)));

// What arithmetic on stored values of type T is done in.
template <class T> struct Arithmetic {
    using Number = float;
    using Lanes = Floats;
    static constexpr int width = kFloats;
};
template <> struct Arithmetic<double> {
    using Number = double;
    using Lanes = Doubles;
    static constexpr int width = kDoubles;
};
template <class T> using Number = typename Arithmetic<T>::Number;
template <class T> using Lanes = typename Arithmetic<T>::Lanes;
template <class T> constexpr int width = Arithmetic<T>::width;

// How much of a register counts: all of it, or the first few lanes (the rest reads as zero and is not written).
struct Whole {};
struct Part {
    int count;
};

INLINE Floats all(float value) { return Floats{} + value; }
INLINE Doubles all(double value) { return Doubles{} + value; }

// Within bounds; NaN stays NaN.
INLINE Floats between(float low, Floats x, float high) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)all(high), _mm512_max_ps((__m512)all(low), (__m512)x));
#elif defined(__AVX__)
    return (Floats)_mm256_min_ps((__m256)all(high), _mm256_max_ps((__m256)all(low), (__m256)x));
#else
    x = x < all(low) ? all(low) : x;
    return x > all(high) ? all(high) : x;
#endif
}

// ---- loads ----------------------------------------------------------------------------------------------------------

template <class V, class T> INLINE V raw(const T* from) {
    V out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
template <class V, class T> INLINE V raw(const T* from, Part part) {
    V out{};
    std::memcpy(&out, from, sizeof(T) * part.count);
    return out;
}

#if defined(__AVX512F__)
INLINE __mmask16 lanes16(Part part) { return static_cast<__mmask16>((1u << part.count) - 1); }
template <> INLINE Floats raw<Floats, float>(const float* from, Part part) {
    return (Floats)_mm512_maskz_loadu_ps(lanes16(part), from);
}
template <> INLINE Halves raw<Halves, bf16>(const bf16* from, Part part) {
    return (Halves)_mm256_maskz_loadu_epi16(lanes16(part), from);
}
template <> INLINE Halves raw<Halves, f16>(const f16* from, Part part) {
    return (Halves)_mm256_maskz_loadu_epi16(lanes16(part), from);
}
#elif defined(__AVX2__)
// A copy of a length that is known only at run time is a call; these few instructions are not.
INLINE Ints leading(int count) {
    Ints lane;
    for (int i = 0; i < kFloats; ++i) lane[i] = i;
    return lane < Ints{} + count;
}
template <> INLINE Floats raw<Floats, float>(const float* from, Part part) {
    return (Floats)_mm256_maskload_ps(from, (__m256i)leading(part.count));
}
INLINE Halves halves(const void* memory, int n) {
    const char* from = static_cast<const char*>(memory);
    uint64_t low = 0, rest = 0;
    if (n & 4) std::memcpy(&low, from, 8), from += 8;
    if (n & 2) std::memcpy(&rest, from, 4), from += 4;
    if (n & 1) {
        uint16_t one;
        std::memcpy(&one, from, 2);
        rest |= static_cast<uint64_t>(one) << (n & 2 ? 32 : 0);
    }
    return (Halves)(n & 4 ? _mm_set_epi64x(static_cast<int64_t>(rest), static_cast<int64_t>(low))
                          : _mm_set_epi64x(0, static_cast<int64_t>(rest)));
}
template <> INLINE Halves raw<Halves, bf16>(const bf16* from, Part part) { return halves(from, part.count); }
template <> INLINE Halves raw<Halves, f16>(const f16* from, Part part) { return halves(from, part.count); }
#endif

INLINE Floats widen(bf16, Halves bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

INLINE float widen_one(f16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    float out;
    if (rest >= 0x7c00) {
        const uint32_t bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
        std::memcpy(&out, &bits, 4);
        return out;
    }
    const uint32_t shifted = rest << 13;  // as a float this is the value times 2^-112, denormals included
    std::memcpy(&out, &shifted, 4);
    out *= 0x1p112f;
    return sign ? -out : out;
}

INLINE Floats widen(f16, Halves bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
    Floats out;
    for (int i = 0; i < kFloats; ++i) out[i] = widen_one(f16{bits[i]});
    return out;
#endif
}

INLINE Floats load(const float* from, Whole) { return raw<Floats>(from); }
INLINE Floats load(const float* from, Part part) { return raw<Floats>(from, part); }
INLINE Doubles load(const double* from, Whole) { return raw<Doubles>(from); }
INLINE Doubles load(const double* from, Part part) { return raw<Doubles>(from, part); }
INLINE Floats load(const bf16* from, Whole) { return widen(bf16{}, raw<Halves>(from)); }
INLINE Floats load(const bf16* from, Part part) { return widen(bf16{}, raw<Halves>(from, part)); }
INLINE Floats load(const f16* from, Whole) { return widen(f16{}, raw<Halves>(from)); }
INLINE Floats load(const f16* from, Part part) { return widen(f16{}, raw<Halves>(from, part)); }

// ---- stores ---------------------------------------------------------------------------------------------------------

INLINE Halves narrow(bf16, Floats value) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i bits = (__m256i)value, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i out = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)value, (__m256)value, _CMP_UNORD_Q);
    out = _mm256_blendv_epi8(out, _mm256_set1_epi32(0x7fc0), nan);
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
#else
    const Words bits = (Words)value;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const Words nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
#endif
}

INLINE uint16_t narrow_one(f16, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
    if (bits < 0x38800000) {                       // below 2^-14: let the adder round at the last denormal bit
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1) - 0x38000000;
    return static_cast<uint16_t>(sign | bits >> 13);
}

INLINE Halves narrow(f16, Floats value) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Halves out;
    for (int i = 0; i < kFloats; ++i) out[i] = narrow_one(f16{}, value[i]);
    return out;
#endif
}

template <class V, class T> INLINE void put(T* to, V value, Whole) { std::memcpy(to, &value, sizeof value); }
template <class V, class T> INLINE void put(T* to, V value, Part part) {
    std::memcpy(to, &value, sizeof(T) * part.count);
}
#if defined(__AVX512F__)
INLINE void put(float* to, Floats value, Part part) { _mm512_mask_storeu_ps(to, lanes16(part), (__m512)value); }
INLINE void put(bf16* to, Halves value, Part part) { _mm256_mask_storeu_epi16(to, lanes16(part), (__m256i)value); }
INLINE void put(f16* to, Halves value, Part part) { _mm256_mask_storeu_epi16(to, lanes16(part), (__m256i)value); }
#elif defined(__AVX2__)
INLINE void put(float* to, Floats value, Part part) {  // masked stores are slow where loads are not
    __m128 rest = _mm256_castps256_ps128((__m256)value);
    if (part.count & 4) {
        _mm_storeu_ps(to, rest), to += 4;
        rest = _mm256_extractf128_ps((__m256)value, 1);
    }
    if (part.count & 2) {
        _mm_storel_pi(reinterpret_cast<__m64*>(to), rest), to += 2;
        rest = _mm_movehl_ps(rest, rest);
    }
    if (part.count & 1) _mm_store_ss(to, rest);
}
INLINE void put_halves(void* memory, Halves value, int n) {
    char* to = static_cast<char*>(memory);
    __m128i rest = (__m128i)value;
    if (n & 4) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), rest), to += 8;
        rest = _mm_unpackhi_epi64(rest, rest);
    }
    uint64_t bits = static_cast<uint64_t>(_mm_cvtsi128_si64(rest));
    if (n & 2) std::memcpy(to, &bits, 4), to += 4, bits >>= 32;
    if (n & 1) std::memcpy(to, &bits, 2);
}
INLINE void put(bf16* to, Halves value, Part part) { put_halves(to, value, part.count); }
INLINE void put(f16* to, Halves value, Part part) { put_halves(to, value, part.count); }
#endif

template <class M> INLINE void store(float* to, Floats value, M m) { put(to, value, m); }
template <class M> INLINE void store(double* to, Doubles value, M m) { put(to, value, m); }
template <class M> INLINE void store(bf16* to, Floats value, M m) { put(to, narrow(bf16{}, value), m); }
template <class M> INLINE void store(f16* to, Floats value, M m) { put(to, narrow(f16{}, value), m); }

// ---- lanes that count -----------------------------------------------------------------------------------------------

template <class V> INLINE V only(V value, Whole) { return value; }
INLINE Floats only(Floats value, Part part) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_mov_ps(lanes16(part), (__m512)value);
#elif defined(__AVX2__)
    return (Floats)((Ints)value & leading(part.count));
#else
    for (int i = part.count; i < kFloats; ++i) value[i] = 0;
    return value;
#endif
}
INLINE Doubles only(Doubles value, Part part) {
    for (int i = part.count; i < kDoubles; ++i) value[i] = 0;
    return value;
}

// Bit i is set where lane i is above zero.
INLINE uint32_t above_zero(Floats value) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)value, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)value, _mm256_setzero_ps(), _CMP_GT_OQ)));
#else
    uint32_t out = 0;
    for (int i = 0; i < kFloats; ++i) out |= static_cast<uint32_t>(value[i] > 0) << i;
    return out;
#endif
}
INLINE uint32_t above_zero(Doubles value) {
    uint32_t out = 0;
    for (int i = 0; i < kDoubles; ++i) out |= static_cast<uint32_t>(value[i] > 0) << i;
    return out;
}

// Lanes whose bit is set; zero elsewhere.
INLINE Floats where(uint32_t bits, Floats value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)value);
#else
    Ints lane;
    for (int i = 0; i < kFloats; ++i) lane[i] = 1 << i;
    const Ints set = ((Ints{} + static_cast<int32_t>(bits)) & lane) != 0;
    return (Floats)((Ints)value & set);
#endif
}
INLINE Doubles where(uint32_t bits, Doubles value) {
    for (int i = 0; i < kDoubles; ++i)
        if (!(bits >> i & 1)) value[i] = 0;
    return value;
}

INLINE void put_bits(uint8_t* to, int64_t index, uint32_t bits, Floats) {
    std::memcpy(to + index / 8, &bits, kFloats / 8);
}
INLINE void put_bits(uint8_t* to, int64_t index, uint32_t bits, Doubles) { to[index / 8] = static_cast<uint8_t>(bits); }
INLINE uint32_t get_bits(const uint8_t* from, int64_t index, Floats) {
    uint32_t bits = 0;
    std::memcpy(&bits, from + index / 8, kFloats / 8);
    return bits;
}
INLINE uint32_t get_bits(const uint8_t* from, int64_t index, Doubles) { return from[index / 8]; }

INLINE double total(Floats value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float half[kFloats];
    std::memcpy(half, &value, sizeof value);
    for (int step = kFloats / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) half[i] += half[i + step];
    return half[0];
#endif
}
INLINE double total(Doubles value) {
    double sum = 0;
    for (int i = 0; i < kDoubles; ++i) sum += value[i];
    return sum;
}

// The totals of several registers, added in the same order as one.
template <class V, int n> INLINE void totals(const V (&values)[n], double* out) {
    for (int k = 0; k < n; ++k) out[k] = total(values[k]);
}
#if defined(__AVX512F__)
INLINE void totals(const Floats (&values)[4], double* out) {
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 a = halves((__m512)values[0], (__m512)values[1]), b = halves((__m512)values[2], (__m512)values[3]);
    __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));  // one in each quarter
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
    const Floats all = (Floats)_mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    for (int k = 0; k < 4; ++k) out[k] = all[4 * k];
}
#endif

// ---- sweeps ---------------------------------------------------------------------------------------------------------

// step(i, whole or part) for every register of n elements. `twice` writes the step down twice per turn.
template <int kWidth, bool twice = true, class Step> INLINE void sweep(int64_t n, Step step) {
    int64_t i = 0;
    if constexpr (twice) {
        for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
            step(i, Whole{});
            step(i + kWidth, Whole{});
        }
        if (i + kWidth <= n) {
            step(i, Whole{});
            i += kWidth;
        }
    } else {
        for (; i + kWidth <= n; i += kWidth) step(i, Whole{});
    }
    if (i < n) step(i, Part{static_cast<int>(n - i)});
}

// The same for sums: step(i, whole or part, accumulator), with four accumulators so that no addition waits for another.
template <int kWidth, bool four = true, class Step> INLINE void sweep_sums(int64_t n, Step step) {
    int64_t i = 0;
    if constexpr (four)
        for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
            step(i, Whole{}, 0);
            step(i + kWidth, Whole{}, 1);
            step(i + 2 * kWidth, Whole{}, 2);
            step(i + 3 * kWidth, Whole{}, 3);
        }
    for (; i + kWidth <= n; i += kWidth) step(i, Whole{}, 0);
    if (i < n) step(i, Part{static_cast<int>(n - i)}, 1);
}

// ---- types ----------------------------------------------------------------------------------------------------------

template <Type type> constexpr bool kHas = NORMKIT_TYPES >> static_cast<int>(type) & 1;

// Calls run with a value of the type that is stored.
template <Type type, class T, class Run> INLINE void if_there(Run run) {
    if constexpr (kHas<type>) run(T{});
}
template <class Run> INLINE void by_type(Type type, Run run) {
    switch (type) {
        case Type::f32: return if_there<Type::f32, float>(run);
        case Type::bf16: return if_there<Type::bf16, bf16>(run);
        case Type::f16: return if_there<Type::f16, f16>(run);
        case Type::f64: return if_there<Type::f64, double>(run);
    }
}

}  // namespace normkit::NORMKIT_ISA
