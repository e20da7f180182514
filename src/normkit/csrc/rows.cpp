// Statistics per row of neighbouring elements, a weight per element: layer and RMS norm; group norm without space, where
// the rows of one sample take turns with `groups` stretches of the weight.
#include <omp.h>

#include "moments.h"
#include "output.h"
#include "weights.h"

namespace normkit::NORMKIT_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 4;   // rows whose share in the weight's gradient is added up in registers
constexpr int64_t kShort = 512;       // rows of so few elements are measured several at once
constexpr int64_t kRowsInFloat = 64;  // rows that may be summed in float before they go into double

struct Geometry {
    explicit Geometry(const Work& w)
        : length(w.c), period(w.groups > 1 ? w.groups : 1), padded((length + kPadding - 1) / kPadding * kPadding) {}
    int64_t turn(int64_t row) const { return row % period * padded; }
    int64_t length, period, padded;
};

// The parameters in the numbers of the arithmetic, every stretch padded; null where there are none.
template <class N> const N* widened(const void* from, const Work& work, const Geometry& g, int slot) {
    if (!from) return nullptr;
    N* out = static_cast<N*>(scratch(slot, sizeof(N) * static_cast<size_t>(g.padded * g.period)));
    for (int64_t i = 0; i < g.period; ++i)
        for (int64_t j = 0; j < g.padded; ++j)
            out[i * g.padded + j] =
                j < g.length ? static_cast<N>(read(from, work.weight_type, i * g.length + j, 0)) : N(0);
    return out;
}

// Mean and squared deviations, read twice: a row stays in the cache.
template <class T> Moments measure(const T* x, int64_t n, bool center) {
    using N = Number<T>;
    double sum = 0, m2 = 0;
    if (center)
        for (int64_t i = 0; i < n; i += kStretch) sum += run_sum<T>(x + i, n - i < kStretch ? n - i : kStretch);
    const N mean = static_cast<N>(sum / static_cast<double>(n));
    double rest = 0;  // what rounding the mean left over
    for (int64_t i = 0; i < n; i += kStretch) {
        Lanes<T> sums[1][2]{};
        run_moments<T>(x + i, 1, n - i < kStretch ? n - i : kStretch, &mean, sums);
        rest += total(sums[0][0]);
        m2 += total(sums[0][1]);
    }
    Moments out;
    out.count = static_cast<double>(n);
    out.mean = mean;
    out.m2 = m2;
    if (center) {
        out.mean += rest / out.count;
        out.m2 -= rest * rest / out.count;
        out.m2 = out.m2 < 0 ? 0 : out.m2;
    }
    return out;
}

// The same for short rows, several at once: by itself each would wait for one sum after another, for a division and for a
// root. What comes of a row does not depend on how many are taken with it.
template <class T, int kRows>
void measure_short(const T* x, int64_t n, bool center, double eps, Number<T>* mean, Number<T>* rstd) {
    using V = Lanes<T>;
    using N = Number<T>;
    const double inverse = 1 / static_cast<double>(n);
    double sum[kRows]{}, rest[kRows], m2[kRows];
    if (center) {
        V added[kRows]{};
        sweep<width<T>>(n, [&](int64_t i, auto m) __attribute__((always_inline)) {
            for (int k = 0; k < kRows; ++k) added[k] += load(x + k * n + i, m);
        });
        totals(added, sum);
    }
    V one[kRows]{}, two[kRows]{};
    N around[kRows];
    for (int k = 0; k < kRows; ++k) around[k] = static_cast<N>(sum[k] * inverse);
    sweep<width<T>>(n, [&](int64_t i, auto m) __attribute__((always_inline)) {
        for (int k = 0; k < kRows; ++k) {
            const V d = only(load(x + k * n + i, m) - around[k], m);
            one[k] += d;
            two[k] += d * d;
        }
    });
    totals(one, rest);
    totals(two, m2);
    for (int k = 0; k < kRows; ++k) {
        double var = m2[k] * inverse;
        if (center) {
            const double left = rest[k] * inverse;  // by rounding the mean
            var -= left * left;
            var = var < 0 ? 0 : var;
            mean[k] = static_cast<N>(around[k] + left);
        } else {
            mean[k] = 0;
        }
        rstd[k] = static_cast<N>(1 / std::sqrt(var + eps));
    }
}

// y = activation((x - mean) * rstd * weight + bias + residual)
template <class T, Epilogue e, bool residual>
void apply(const Work& work, const T* x, const T* r, T* y, uint8_t* bits, int64_t n, Number<T> mean, Number<T> rstd,
           const Number<T>* weight, const Number<T>* bias) {
    using V = Lanes<T>;
    const V slope = all(static_cast<Number<T>>(work.slope));
    const Activation kind = work.activation;
    sweep<width<T>, e != Epilogue::any>(n, [&](int64_t i, auto m) __attribute__((always_inline)) {
        V z = (load(x + i, m) - mean) * rstd;
        if (weight) z *= load(weight + i, Whole{});
        if (bias) z += load(bias + i, Whole{});
        if constexpr (residual)
            if (r) z += load(r + i, m);
        if constexpr (residual && (e == Epilogue::relu || e == Epilogue::any))
            if (bits) put_bits(bits, i, above_zero(z), z);
        store(y + i, activated<e>(z, kind, slope), m);
    });
}

template <class T> auto pick_apply(const Work& work) {
    return for_epilogue<T, Epilogue::none, Epilogue::relu, Epilogue::silu>(work, [&](auto e) {
        constexpr Epilogue own = decltype(e)::value;
        if constexpr (own == Epilogue::none || own == Epilogue::relu)
            if (!work.residual) return apply<T, own, false>;
        return apply<T, own, true>;
    });
}

// Statistics of the rows from this one on; how many.
template <class T> int64_t measure(const Work& work, const Forward& call, int64_t row, int64_t end) {
    using N = Number<T>;
    const int64_t n = work.c;
    const T* x = static_cast<const T*>(call.x) + row * n;
    N *mean = static_cast<N*>(call.mean) + row, *rstd = static_cast<N*>(call.rstd) + row;
    if (n > kShort) {
        const Moments m = measure<T>(x, n, work.center);
        *mean = static_cast<N>(m.mean);
        *rstd = static_cast<N>(1 / std::sqrt(m.m2 / m.count + call.eps));
        return 1;
    }
    const bool several = end - row >= kRowsAtOnce;
    (several ? measure_short<T, kRowsAtOnce> : measure_short<T, 1>)(x, n, work.center, call.eps, mean, rstd);
    return several ? kRowsAtOnce : 1;
}

template <class T> void forwards(const Work& work, const Forward& call) {
    using N = Number<T>;
    const Geometry g(work);
    const N* weight = widened<N>(call.weight, work, g, 0);
    const N* bias = widened<N>(call.bias, work, g, 1);
    const auto leaf = pick_apply<T>(work);
    const int64_t padded_bits = bit_bytes(g.length);
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        const Range mine = share(work.n, omp_get_thread_num(), omp_get_num_threads());
        Output<T> output(call.stream);
        int64_t measured = mine.begin;  // rows before this one have their statistics
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            const T* x = static_cast<const T*>(call.x) + row * g.length;
            if (row == measured) measured += measure<T>(work, call, row, mine.end);
            const N mean = static_cast<N*>(call.mean)[row], rstd = static_cast<N*>(call.rstd)[row];
            for (int64_t i = 0; i < g.length; i += Output<T>::kRoom) {
                const int64_t left = g.length - i, n = left < Output<T>::kRoom ? left : Output<T>::kRoom;
                const int64_t here = row * g.length + i, at = g.turn(row) + i;
                leaf(work, x + i, call.residual ? static_cast<const T*>(call.residual) + here : nullptr,
                     output.room(static_cast<T*>(call.y) + here, n),
                     call.bits ? call.bits + row * padded_bits + i / 8 : nullptr, n, mean, rstd,
                     weight ? weight + at : nullptr, bias ? bias + at : nullptr);
            }
        }
    }
}

template <class T> struct Row {
    const T *x, *dy, *residual;
    const uint8_t* bits;
    Number<T> mean, rstd;
};

// The gradient before the activation, and the standardised input.
template <class T, Gate g, class M>
INLINE void look(Activation kind, const Row<T>& row, int64_t i, M m, const Number<T>* weight, const Number<T>* bias,
                 Lanes<T> slope, Lanes<T>& dz, Lanes<T>& hat) {
    hat = (load(row.x + i, m) - row.mean) * row.rstd;
    dz = load(row.dy + i, m);
    if constexpr (g == Gate::none) return;
    if (g == Gate::bits || (g == Gate::any && row.bits)) {
        dz = where(get_bits(row.bits, i, dz), dz);
    } else {
        Lanes<T> z = hat;
        if (weight) z *= load(weight + i, Whole{});
        if (bias) z += load(bias + i, Whole{});
        if constexpr (g == Gate::any || g == Gate::silu)
            if (row.residual) z += load(row.residual + i, m);
        dz = gated<g>(dz, z, kind, slope);
    }
}

// Adds to dweight and dbias, and to sums[row]: w dz, and w dz times the standardised input.
template <class T, Gate g, int kRows>
void sum_rows(const Work& work, const Row<T>* given, int64_t n, const Number<T>* weight, const Number<T>* bias,
              Number<T>* dweight, Number<T>* dbias, double (*sums)[2]) {
    using V = Lanes<T>;
    const V slope = all(static_cast<Number<T>>(work.slope));
    const Activation kind = work.activation;
    Row<T> rows[kRows];  // its own, which the stores below cannot change
    for (int k = 0; k < kRows; ++k) rows[k] = given[k];
    for (int64_t start = 0; start < n; start += kStretch) {
        V one[kRows]{}, two[kRows]{};
        const auto add = [&](int64_t j, auto m) __attribute__((always_inline)) {
            const int64_t i = start + j;
            V w = all(Number<T>(1)), to_weight{}, to_bias{};
            if (weight) w = load(weight + i, Whole{});
            for (int k = 0; k < kRows; ++k) {
                V dz, hat;
                look<T, g>(kind, rows[k], i, m, weight, bias, slope, dz, hat);
                to_bias += dz;
                to_weight += dz * hat;
                const V wdz = dz * w;
                one[k] += wdz;
                two[k] += wdz * hat;
            }
            if (dweight) store(dweight + i, load(dweight + i, Whole{}) + to_weight, Whole{});
            if (dbias) store(dbias + i, load(dbias + i, Whole{}) + to_bias, Whole{});
        };
        sweep<width<T>, g != Gate::any>(n - start < kStretch ? n - start : kStretch, add);
        double first[kRows], second[kRows];
        totals(one, first);
        totals(two, second);
        for (int k = 0; k < kRows; ++k) {
            sums[k][0] += first[k];
            sums[k][1] += second[k];
        }
    }
}

// dx = rstd (w dz - a - standardised b)
template <class T, Gate g>
void write_row(const Work& work, const Row<T>& given, int64_t start, int64_t n, const Number<T>* weight,
               const Number<T>* bias, Number<T> a, Number<T> b, T* dx, T* dr) {
    using V = Lanes<T>;
    const V slope = all(static_cast<Number<T>>(work.slope));
    const Activation kind = work.activation;
    const Row<T> row = given;
    sweep<width<T>, g != Gate::any>(n, [&](int64_t j, auto m) __attribute__((always_inline)) {
        const int64_t i = start + j;
        V dz, hat;
        look<T, g>(kind, row, i, m, weight, bias, slope, dz, hat);
        if (dr) store(dr + j, dz, m);
        if (weight) dz *= load(weight + i, Whole{});
        if (dx) store(dx + j, (dz - a - hat * b) * row.rstd, m);
    });
}

template <class T> struct Leaves {
    decltype(&sum_rows<T, Gate::any, 1>) several, one;
    decltype(&write_row<T, Gate::any>) write;
};

template <class T> void backwards(const Work& work, const Backward& call) {
    using N = Number<T>;
    const Geometry g(work);
    const auto leaves = for_gate<T, Gate::none, Gate::relu, Gate::bits, Gate::silu>(work, [](auto gate) {
        constexpr Gate own = decltype(gate)::value;
        return Leaves<T>{sum_rows<T, own, kRowsAtOnce>, sum_rows<T, own, 1>, write_row<T, own>};
    });
    const N* weight = widened<N>(call.weight, work, g, 0);
    const N* bias = widened<N>(call.bias, work, g, 1);
    const int64_t all = g.padded * g.period;
    N* partial = static_cast<N*>(scratch(2, sizeof(N) * static_cast<size_t>(2 * all * call.threads)));
    double* gathered = static_cast<double*>(scratch(3, sizeof(double) * static_cast<size_t>(2 * all * call.threads)));
    int team = 1;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        const int me = omp_get_thread_num();
        if (me == 0) team = omp_get_num_threads();
        const Range mine = share(work.n, me, omp_get_num_threads());
        N* in_float = partial + 2 * all * me;
        double* in_double = gathered + 2 * all * me;
        for (int64_t j = 0; j < 2 * all; ++j) in_float[j] = in_double[j] = 0;
        const auto settle = [=] {
            for (int64_t j = 0; j < 2 * all; ++j) {
                in_double[j] += in_float[j];
                in_float[j] = 0;
            }
        };
        Output<T> to_x(call.stream), to_residual(call.stream);
        const int64_t step = g.period == 1 ? kRowsAtOnce : 1;
        int64_t pending = 0;
        for (int64_t row = mine.begin; row < mine.end; row += step) {
            const int64_t count = mine.end - row < step ? mine.end - row : step, turn = g.turn(row);
            Row<T> rows[kRowsAtOnce];
            double sums[kRowsAtOnce][2]{};
            for (int64_t k = 0; k < count; ++k) {
                const int64_t here = (row + k) * g.length;
                rows[k] = {static_cast<const T*>(call.x) + here, static_cast<const T*>(call.dy) + here,
                           call.residual ? static_cast<const T*>(call.residual) + here : nullptr,
                           call.bits ? call.bits + (row + k) * bit_bytes(g.length) : nullptr,
                           static_cast<const N*>(call.mean)[row + k], static_cast<const N*>(call.rstd)[row + k]};
            }
            const N *w = weight ? weight + turn : nullptr, *b = bias ? bias + turn : nullptr;
            N *dw = call.dweight ? in_float + turn : nullptr, *db = call.dbias ? in_float + all + turn : nullptr;
            if (count == kRowsAtOnce)
                leaves.several(work, rows, g.length, w, b, dw, db, sums);
            else
                for (int64_t k = 0; k < count; ++k)
                    leaves.one(work, rows + k, g.length, w, b, dw, db, sums + k);
            if ((pending += count) >= kRowsInFloat * g.period) {
                settle();
                pending = 0;
            }
            if (!call.dx && !call.dresidual) continue;
            for (int64_t k = count; k-- > 0;) {
                const N mean_dz = static_cast<N>(work.center ? sums[k][0] / static_cast<double>(g.length) : 0);
                const N mean_dz_x = static_cast<N>(sums[k][1] / static_cast<double>(g.length));
                for (int64_t i = 0; i < g.length; i += Output<T>::kRoom) {
                    const int64_t left = g.length - i, n = left < Output<T>::kRoom ? left : Output<T>::kRoom;
                    const int64_t here = (row + k) * g.length + i;
                    T *dx = static_cast<T*>(call.dx), *dr = static_cast<T*>(call.dresidual);
                    leaves.write(work, rows[k], i, n, w, b, mean_dz, mean_dz_x,
                                       dx ? to_x.room(dx + here, n) : nullptr,
                                       dr ? to_residual.room(dr + here, n) : nullptr);
                }
            }
        }
        settle();
    }
    for (int64_t i = 0; i < g.period * g.length; ++i) {
        const int64_t j = i / g.length * g.padded + i % g.length;
        double dw = 0, db = 0;
        for (int t = 0; t < team; ++t) {
            dw += gathered[2 * all * t + j];
            db += gathered[2 * all * t + all + j];
        }
        write(call.dweight, work.weight_type, i, dw);
        write(call.dbias, work.weight_type, i, db);
    }
}

}  // namespace

void rows_forward(const Work& work, const Forward& call) {
    by_type(work.type, [&](auto value) { forwards<decltype(value)>(work, call); });
}

void rows_backward(const Work& work, const Backward& call) {
    by_type(work.type, [&](auto value) { backwards<decltype(value)>(work, call); });
}

}  // namespace normkit::NORMKIT_ISA
