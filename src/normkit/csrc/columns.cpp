// Statistics over columns: (n, s, c) with the channels of one position side by side (channels-last, or plain features).
//
// Threads own ranges of rows. Sums of a few registers of columns stay in registers over a tile of rows, go to memory per
// tile, and into double every few hundred rows. Narrow rows are taken several at a time, as one wide run in which every
// channel occurs `together` times; the copies are merged at the end. Wide rows of groups are cut into blocks of channels
// where the second pass then finds in the cache what the first one has left there.
#include <omp.h>

#include "moments.h"
#include "output.h"
#include "weights.h"

namespace normkit::NORMKIT_ISA {
namespace {

constexpr int kAbreast = kFloats == 16 ? 4 : 2;  // registers of columns that are summed at once
constexpr int64_t kPeriod = 512;                 // runs that may be summed in float before they go into double

// Batch norm is one section of all rows; group and instance norm have one section per sample and block of channels.
struct Geometry {
    Geometry(const Work& w, int threads, bool keeps) : work(w), together(rows_per_run(w)) {
        rows = w.groups ? w.s : w.n * w.s;
        blocks = keeps && together == 1 ? cut() : 1;
        channels = w.c / blocks;
        width = together * channels, stride = together * w.c;
        sections = w.groups ? w.n * blocks : 1;
        runs = rows / together;
        rest = rows % together;
        // Whole sections per thread where there are enough of them; otherwise all threads share each section.
        team = sections >= 4 * threads || sections % threads == 0 ? 1 : threads;
        padded = (width + kPadding - 1) / kPadding * kPadding;
        tile = 16384 / (width * 4);
        tile = tile < 8 ? 8 : tile > 64 ? 64 : tile;
        stretch = 65536 / (width * 4);
        stretch = stretch < 1 ? 1 : stretch;
    }
    // Channel i of a section, and its statistic.
    int64_t channel(int64_t section, int64_t i) const { return section % blocks * channels + i; }
    int64_t statistic(int64_t section, int64_t i) const {
        return work.groups ? section / blocks * work.groups + channel(section, i) / pooled() : i;
    }
    int64_t pooled() const { return work.groups ? work.c / work.groups : 1; }  // channels of one statistic

    // Calls step(place in the section, channel, statistic) for a member's share of a section's channels. Divisions are made
    // once per statistic: on small maps one per channel would be a good part of the time.
    template <class Step> void each_channel(int64_t section, int place, int members, Step step) const {
        const int64_t each = pooled(), away = channel(section, 0), first = statistic(section, 0);
        const Range mine = share(channels / each, place, members);
        for (int64_t u = mine.begin; u < mine.end; ++u)
            for (int64_t i = u * each; i < (u + 1) * each; ++i) step(i, away + i, first + u);
    }
    int64_t start(int64_t section, int64_t run) const {
        return section / blocks * rows * work.c + channel(section, 0) + run * stride;
    }
    // Mask bits: every full run, and at the end of a section the rest, starts on a byte.
    int64_t bits_of_section() const { return runs * bit_bytes(width) + bit_bytes(rest * work.c); }

    const Work& work;
    int64_t together, blocks, channels, width;  // a run has `together` times the channels of a block
    int64_t stride;                             // from run to run
    int64_t sections, rows, runs, rest, team, padded, tile;
    int64_t stretch;  // runs that are written in ascending order, before the stretch below them

  private:
    // The fewest blocks, of whole groups, so that the gradients of one can be kept: 1 where they would be narrow, for memory
    // is read and written in long stretches.
    int64_t cut() const {
        for (int64_t n = 1; work.groups && n <= work.groups; n *= 2) {
            if (work.groups % n || work.c / n < kNarrowest) break;
            if (rows * (work.c / n) <= kKept) return n;
        }
        return 1;
    }
    static constexpr int64_t kNarrowest = 192;
};

// Calls step(run) for all runs, the last ones first, because they were read last; in stretches that go upwards, because
// that is how memory is read ahead.
template <class Step> INLINE void backwards(const Geometry& g, Range runs, Step step) {
    for (int64_t end = runs.end; end > runs.begin; end -= g.stretch) {
        const int64_t begin = end - g.stretch;
        for (int64_t run = begin > runs.begin ? begin : runs.begin; run < end; ++run) step(run);
    }
}

// Calls step(register index, lanes) for n columns, several registers in one call where there are enough.
template <class T, class Wide, class Narrow> INLINE void across(int64_t n, Wide wide, Narrow narrow) {
    int64_t j = 0;
    for (; j + kAbreast * width<T> <= n; j += kAbreast * width<T>) wide(j);
    for (; j + width<T> <= n; j += width<T>) narrow(j, Whole{});
    if (j < n) narrow(j, Part{static_cast<int>(n - j)});
}

template <class T, int kRegisters, class M>
INLINE void add_moments(const T* x, int64_t rows, int64_t stride, int64_t j, M m, const Number<T>* shift,
                        Number<T>* one, Number<T>* two) {
    using V = Lanes<T>;
    V s[kRegisters]{}, q[kRegisters]{}, around[kRegisters];
    for (int k = 0; k < kRegisters; ++k) around[k] = load(shift + j + k * width<T>, Whole{});
    for (int64_t row = 0; row < rows; ++row)
        for (int k = 0; k < kRegisters; ++k) {
            const T* from = x + row * stride + j + k * width<T>;
            __builtin_prefetch(from + rows * stride);  // the next tile: registers walk down, memory would rather go along
            const V d = load(from, m) - around[k];
            s[k] += d;
            q[k] += d * d;
        }
    for (int k = 0; k < kRegisters; ++k) {
        const int64_t at = j + k * width<T>;
        store(one + at, load(one + at, Whole{}) + s[k], Whole{});
        store(two + at, load(two + at, Whole{}) + q[k], Whole{});
    }
}

template <class T>
void tile_moments(const T* x, int64_t rows, int64_t stride, int64_t width, const Number<T>* shift, Number<T>* one,
                  Number<T>* two) {
    across<T>(
        width,
        [=](int64_t j)
            __attribute__((always_inline)) { add_moments<T, kAbreast>(x, rows, stride, j, Whole{}, shift, one, two); },
        [=](int64_t j, auto m)
            __attribute__((always_inline)) { add_moments<T, 1>(x, rows, stride, j, m, shift, one, two); });
}

template <class T> struct TileSums {
    using N = Number<T>;
    // `n` columns of rows that are `stride` apart; dz is kept, row behind row, where `keep` points.
    using Leaf = void (*)(const Work&, const T* x, const T* dy, const T* residual, const uint8_t* bits, N* keep,
                          int64_t rows, int64_t stride, int64_t n, const N* mean, const N* scale, const N* shift,
                          N* one, N* two);

    template <Gate g, int kRegisters, class M>
    static INLINE void add(const Work& work, const T* x, const T* dy, const T* r, const uint8_t* bits, N* keep,
                           int64_t rows, int64_t stride, int64_t n, int64_t j, M m, const N* mean, const N* scale,
                           const N* shift, N* one, N* two) {
        using V = Lanes<T>;
        const V slope = all(static_cast<N>(work.slope));
        const Activation kind = work.activation;
        V s[kRegisters]{}, q[kRegisters]{}, centre[kRegisters], a[kRegisters], b[kRegisters];
        for (int k = 0; k < kRegisters; ++k) {
            centre[k] = load(mean + j + k * width<T>, Whole{});
            a[k] = load(scale + j + k * width<T>, Whole{});
            b[k] = load(shift + j + k * width<T>, Whole{});
        }
        for (int64_t row = 0; row < rows; ++row)
            for (int k = 0; k < kRegisters; ++k) {
                const int64_t column = j + k * width<T>, at = row * stride + column;
                __builtin_prefetch(x + at + rows * stride);
                __builtin_prefetch(dy + at + rows * stride);
                V v, dz;
                look<g>(kind, x, dy, r, at, bits, 8 * row * bit_bytes(n) + column, m, a[k], b[k], slope, v, dz);
                if constexpr (kCurved<g>)
                    if (keep) store(keep + row * n + column, dz, m);
                s[k] += dz;
                q[k] += dz * (v - centre[k]);
            }
        for (int k = 0; k < kRegisters; ++k) {
            const int64_t at = j + k * width<T>;
            store(one + at, load(one + at, Whole{}) + s[k], Whole{});
            store(two + at, load(two + at, Whole{}) + q[k], Whole{});
        }
    }

    template <Gate g>
    static void leaf(const Work& work, const T* x, const T* dy, const T* r, const uint8_t* bits, N* keep, int64_t rows,
                     int64_t stride, int64_t n, const N* mean, const N* scale, const N* shift, N* one, N* two) {
        across<T>(
            n,
            [&](int64_t j) __attribute__((always_inline)) {
                add<g, kAbreast>(work, x, dy, r, bits, keep, rows, stride, n, j, Whole{}, mean, scale, shift, one, two);
            },
            [&](int64_t j, auto m) __attribute__((always_inline)) {
                add<g, 1>(work, x, dy, r, bits, keep, rows, stride, n, j, m, mean, scale, shift, one, two);
            });
    }

    static Leaf pick(const Work& work) {
        return for_gate<T, Gate::none, Gate::relu, Gate::bits, Gate::output, Gate::silu>(
            work, [](auto g) -> Leaf { return leaf<decltype(g)::value>; });
    }
};

// One number per column of a run, `count` arrays of them, for each of `threads` threads.
template <class N> N* arrays(int slot, const Geometry& g, int64_t count, int64_t threads) {
    return static_cast<N*>(scratch(slot, sizeof(N) * static_cast<size_t>(g.padded * count * threads)));
}

// Calls body(section, the thread's runs, whether it also has the rest, its place in the team) for each section it has.
template <class Body> void divide(const Geometry& g, int threads, Body body) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        if (g.team == 1) {
            const Range mine = share(g.sections, me, all);
            for (int64_t section = mine.begin; section < mine.end; ++section)
                body(section, Range{0, g.runs}, g.rest > 0, me, 0, 1);
        } else {
            for (int64_t section = 0; section < g.sections; ++section)
                body(section, share(g.runs, me, all), g.rest && me == all - 1, me, me, all);
        }
        fence();
    }
}

inline void wait(int members) {
    if (members > 1) {
#pragma omp barrier
    }
}

template <class T> class Forwards {
    using N = Number<T>;

  public:
    Forwards(const Work& work, const Forward& call)
        : work(work), call(call), g(work, call.threads, false), x(static_cast<const T*>(call.x)),
          apply(Apply<T, Per::element>::pick(work)), sums(arrays<N>(0, g, 3, call.threads)),
          gathered(arrays<double>(1, g, 3, call.threads)), coefficients(arrays<N>(2, g, 2, call.threads)) {}

    void run() {
        divide(g, call.threads, [this](int64_t section, Range runs, bool rest, int me, int place, int members) {
            double* mine = gathered + me * 3 * g.padded;
            N* scale = coefficients + (members > 1 ? 0 : me) * 2 * g.padded;
            if (work.batch && (call.steps & first)) {
                measure(section, runs, rest, me, mine);
                wait(members);
                finish(section, members > 1 ? gathered : mine, place, members);
            }
            wait(members);
            if (call.steps & second) {
                prepare(section, scale, place, members);
                wait(members);
                write_out(section, runs, rest, scale);
            }
            wait(members);
        });
    }

  private:
    const T* at(int64_t section, int64_t run) const { return x + g.start(section, run); }

    // Into `out`: count, mean and squared deviations of every column of the thread's runs.
    void measure(int64_t section, Range runs, bool rest, int me, double* out) {
        double *count = out, *mean = out + g.padded, *m2 = out + 2 * g.padded;
        N *shift = sums + me * 3 * g.padded, *one = shift + g.padded, *two = one + g.padded;
        for (int64_t j = 0; j < g.padded; ++j) count[j] = mean[j] = m2[j] = shift[j] = one[j] = two[j] = 0;
        const int64_t probe = runs.end - runs.begin < 16 ? runs.end - runs.begin : 16;
        tile_moments<T>(at(section, runs.begin), probe, g.stride, g.width, shift, one, two);
        for (int64_t j = 0; j < g.width; ++j) {
            shift[j] = probe ? one[j] / static_cast<N>(probe) : 0;
            one[j] = two[j] = 0;
        }
        int64_t pending = 0;
        for (int64_t run = runs.begin; run < runs.end; run += g.tile) {
            const int64_t n = runs.end - run < g.tile ? runs.end - run : g.tile;
            tile_moments<T>(at(section, run), n, g.stride, g.width, shift, one, two);
            pending += n;
            if (pending >= kPeriod || run + n == runs.end) {
                settle(g.width, static_cast<double>(pending), shift, one, two, count, mean, m2);
                pending = 0;
            }
        }
        if (rest) {
            tile_moments<T>(at(section, g.runs), 1, g.stride, g.rest * work.c, shift, one, two);
            settle(g.rest * work.c, 1, shift, one, two, count, mean, m2);
        }
    }

    static void settle(int64_t n, double added, N* __restrict shift, N* __restrict one, N* __restrict two,
                       double* __restrict count, double* __restrict mean, double* __restrict m2) {
        const double before = count[0], total = before + added;  // columns that the rest lacks are not settled with it
        const double inverse = 1 / added, part = added / total, weight = before * part;
        for (int64_t j = 0; j < n; ++j) {
            const double offset = one[j] * inverse, delta = shift[j] + offset - mean[j], own = two[j] - one[j] * offset;
            count[j] = total;
            mean[j] += delta * part;
            m2[j] += (own < 0 ? 0 : own) + delta * delta * weight;
            shift[j] = static_cast<N>(mean[j]);
            one[j] = two[j] = 0;
        }
    }

    // Merges members and copies of a channel, then the channels of a group.
    void finish(int64_t section, const double* parts, int place, int members) {
        const int64_t pooled = g.pooled();
        const Range mine = share(g.channels / pooled, place, members);
        const auto visit = [&](int64_t i, auto step) {
            for (int member = 0; member < members; ++member)
                for (int64_t c = i * pooled; c < (i + 1) * pooled; ++c)
                    for (int64_t j = c; j < g.width; j += g.channels) {
                        const double* part = parts + member * 3 * g.padded;
                        step(part[j], part[g.padded + j], part[2 * g.padded + j]);
                    }
        };
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            Moments m;  // all parts are at hand: one division instead of one per merge
            visit(i, [&](double count, double mean, double) { m.count += count, m.mean += count * mean; });
            m.mean /= m.count;
            visit(i, [&](double count, double mean, double m2) {
                m.m2 += m2 + count * (mean - m.mean) * (mean - m.mean);
            });
            const int64_t u = g.statistic(section, i * pooled);
            const double var = m.m2 / m.count;
            static_cast<N*>(call.mean)[u] = static_cast<N>(m.mean);
            static_cast<N*>(call.rstd)[u] = static_cast<N>(1 / std::sqrt(var + call.eps));
            if (call.var) static_cast<N*>(call.var)[u] = static_cast<N>(var);
            if (!work.groups) move_running<N>(call, u, m.mean, var, m.count);
        }
    }

    void prepare(int64_t section, N* scale, int place, int members) {
        g.each_channel(section, place, members, [&](int64_t i, int64_t c, int64_t u) {
            const Affine a = affine(static_cast<N*>(call.mean)[u], static_cast<N*>(call.rstd)[u],
                                    read(call.weight, work.weight_type, c, 1),
                                    read(call.bias, work.weight_type, c, 0));
            for (int64_t j = i; j < g.width; j += g.channels) {
                scale[j] = static_cast<N>(a.scale);
                scale[g.padded + j] = static_cast<N>(a.shift);
            }
        });
    }

    void write_out(int64_t section, Range runs, bool rest, const N* scale) {
        Output<T> output(call.stream);
        if (rest) write_run(section, g.runs, g.rest * work.c, scale, output);
        backwards(g, runs, [&](int64_t run) { write_run(section, run, g.width, scale, output); });
    }

    void write_run(int64_t section, int64_t run, int64_t width, const N* scale, Output<T>& output) {
        uint8_t* bits = call.bits ? call.bits + section * g.bits_of_section() + run * bit_bytes(g.width) : nullptr;
        const int64_t start = g.start(section, run);
        for (int64_t i = 0; i < width; i += Output<T>::kRoom) {
            const int64_t n = width - i < Output<T>::kRoom ? width - i : Output<T>::kRoom, here = start + i;
            apply(work, x + here, call.residual ? static_cast<const T*>(call.residual) + here : nullptr,
                  output.room(static_cast<T*>(call.y) + here, n), bits ? bits + i / 8 : nullptr, 1, n, scale + i,
                  scale + g.padded + i);
        }
    }

    const Work& work;
    const Forward& call;
    const Geometry g;
    const T* x;
    typename Apply<T, Per::element>::Leaf apply;
    N* sums;
    double* gathered;
    N* coefficients;
};

template <class T> class Backwards {
    using N = Number<T>;
    enum Column { kMean, kScale, kShift, kP, kQ, kR, kColumns };
    struct Pair {
        double dz, dz_x;
    };

  public:
    Backwards(const Work& work, const Backward& call)
        : work(work), call(call), g(work, call.threads, keeps(call)), x(static_cast<const T*>(call.x)),
          dy(static_cast<const T*>(call.dy)), residual(static_cast<const T*>(call.residual)),
          sum(TileSums<T>::pick(work)), gradient(Gradient<T, Per::element>::pick(work)),
          from_kept(Gradient<T, Per::element, N>::template leaf<Gate::none>),
          sums(arrays<N>(0, g, 2, call.threads)), gathered(arrays<double>(1, g, 2, call.threads)),
          columns(arrays<N>(2, g, kColumns, call.threads)),
          totals(static_cast<double*>(
              scratch(3, sizeof(double) * 2 * static_cast<size_t>(work.c * (work.groups ? work.n : 1))))) {}

    void run() {
        const bool measures = (call.steps & first) && (work.batch || call.dweight || call.dbias);
        const bool writes = (call.steps & second) && (call.dx || call.dresidual);
        const int64_t most = g.rows * g.channels, room = most < kKept ? most : kKept;
        N* const all_kept =
            keeps(call) ? static_cast<N*>(scratch(4, sizeof(N) * static_cast<size_t>(room * call.threads))) : nullptr;
        divide(g, call.threads, [=](int64_t section, Range runs, bool rest, int me, int place, int members) {
            double* mine = gathered + me * 2 * g.padded;
            N* column = columns + (members > 1 ? 0 : me) * kColumns * g.padded;
            double* total = totals + section / g.blocks * 2 * work.c;
            const int64_t elements = (runs.end - runs.begin) * g.width + (rest ? g.rest * work.c : 0);
            N* kept = all_kept && elements <= room ? all_kept + me * room : nullptr;
            prepare(section, column, place, members);
            wait(members);
            if (measures) {
                measure(section, runs, rest, me, column, kept, mine);
                wait(members);
                finish(section, members > 1 ? gathered : mine, total, place, members);
                wait(members);
                if (work.groups && call.sum_dz) hand_over(section, total, place, members);
            }
            if (writes) {
                prepare_slopes(section, total, column, place, members);
                wait(members);
                write_out(section, runs, rest, column, kept);
            }
            wait(members);
        });
        if (work.groups && measures) over_samples();
    }

  private:
    // Whether gradients before the activation are written down between the passes, if there is room for them.
    bool keeps(const Backward& call) const {
        return curved(work) && (call.steps & first) && (call.steps & second) &&
               (work.batch || call.dweight || call.dbias) && (call.dx || call.dresidual);
    }

    N mean(int64_t u) const { return static_cast<const N*>(call.mean)[u]; }
    N rstd(int64_t u) const { return static_cast<const N*>(call.rstd)[u]; }
    double weight(int64_t c) const { return read(call.weight, work.weight_type, c, 1); }

    void prepare(int64_t section, N* column, int place, int members) {
        g.each_channel(section, place, members, [&](int64_t i, int64_t c, int64_t u) {
            const Affine a = affine(mean(u), rstd(u), weight(c), read(call.bias, work.weight_type, c, 0));
            for (int64_t j = i; j < g.width; j += g.channels) {
                column[kMean * g.padded + j] = mean(u);
                column[kScale * g.padded + j] = static_cast<N>(a.scale);
                column[kShift * g.padded + j] = static_cast<N>(a.shift);
            }
        });
    }

    void measure(int64_t section, Range runs, bool rest, int me, const N* column, N* kept, double* out) {
        double *dz = out, *dz_x = out + g.padded;
        N *one = sums + me * 2 * g.padded, *two = one + g.padded;
        for (int64_t j = 0; j < g.padded; ++j) dz[j] = dz_x[j] = one[j] = two[j] = 0;
        const auto settle = [=](int64_t n) {
            for (int64_t j = 0; j < n; ++j) {
                dz[j] += one[j];
                dz_x[j] += two[j];
                one[j] = two[j] = 0;
            }
        };
        const auto add = [&](int64_t run, int64_t n, int64_t width) {
            const int64_t here = g.start(section, run);
            sum(work, x + here, dy + here, residual ? residual + here : nullptr, bits(section, run),
                kept ? kept + place_of(runs, run) : nullptr, n, g.stride, width, column + kMean * g.padded,
                column + kScale * g.padded, column + kShift * g.padded, one, two);
        };
        int64_t pending = 0;
        for (int64_t run = runs.begin; run < runs.end; run += g.tile) {
            const int64_t n = runs.end - run < g.tile ? runs.end - run : g.tile;
            add(run, n, g.width);
            if ((pending += n) >= kPeriod) {
                settle(g.width);
                pending = 0;
            }
        }
        settle(g.width);
        if (rest) {
            add(g.runs, 1, g.rest * work.c);
            settle(g.rest * work.c);
        }
    }

    // Where the gradients of a run are kept: those of the rest behind all others.
    int64_t place_of(Range runs, int64_t run) const {
        return ((run < runs.end ? run : runs.end) - runs.begin) * g.width;
    }

    const uint8_t* bits(int64_t section, int64_t run) const {
        return call.bits ? call.bits + section * g.bits_of_section() + run * bit_bytes(g.width) : nullptr;
    }

    void finish(int64_t section, const double* parts, double* total, int place, int members) {
        g.each_channel(section, place, members, [&](int64_t i, int64_t c, int64_t u) {
            double dz = 0, dz_x = 0;
            for (int member = 0; member < members; ++member)
                for (int64_t j = i; j < g.width; j += g.channels) {
                    dz += parts[member * 2 * g.padded + j];
                    dz_x += parts[(member * 2 + 1) * g.padded + j];
                }
            total[c] = dz;
            total[work.c + c] = dz_x;
            if (work.groups) return;
            if (call.sum_dz) static_cast<N*>(call.sum_dz)[c] = static_cast<N>(dz);
            if (call.sum_dz_x) static_cast<N*>(call.sum_dz_x)[c] = static_cast<N>(dz_x);
            write(call.dweight, work.weight_type, c, dz_x * rstd(u));
            write(call.dbias, work.weight_type, c, dz);
        });
    }

    void prepare_slopes(int64_t section, const double* total, N* column, int place, int members) {
        const int64_t pooled = g.pooled();
        const Range mine = share(g.channels / pooled, place, members);
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            const Pair sums = weighted(section, i, total);
            const int64_t u = g.statistic(section, i * pooled), away = g.channel(section, 0);
            const Slopes s = slopes(work, mean(u), rstd(u), 1, sums.dz / call.count, sums.dz_x / call.count);
            for (int64_t k = i * pooled; k < (i + 1) * pooled; ++k) {
                const double p = s.p * weight(away + k);
                for (int64_t j = k; j < g.width; j += g.channels) {
                    column[kP * g.padded + j] = static_cast<N>(p);
                    column[kQ * g.padded + j] = static_cast<N>(s.q);
                    column[kR * g.padded + j] = static_cast<N>(s.r);
                }
            }
        }
    }

    // Sums of dz w and dz w (x - mean) of statistic i of a section: of this pass, or given from outside.
    Pair weighted(int64_t section, int64_t i, const double* total) const {
        const int64_t pooled = g.pooled(), u = g.statistic(section, i * pooled);
        if (!(call.steps & first) && call.sum_dz) {
            const double w = work.groups ? 1 : weight(i);  // groups hand them over with their weights
            return {w * static_cast<const N*>(call.sum_dz)[u], w * static_cast<const N*>(call.sum_dz_x)[u]};
        }
        Pair sums{0, 0};
        const int64_t begin = g.channel(section, i * pooled);
        for (int64_t c = begin; work.batch && c < begin + pooled; ++c) {
            sums.dz += weight(c) * total[c];
            sums.dz_x += weight(c) * total[work.c + c];
        }
        return sums;
    }

    void hand_over(int64_t section, const double* total, int place, int members) {
        const int64_t pooled = g.pooled();
        const Range mine = share(g.channels / pooled, place, members);
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            const Pair sums = weighted(section, i, total);
            const int64_t u = g.statistic(section, i * pooled);
            static_cast<N*>(call.sum_dz)[u] = static_cast<N>(sums.dz);
            static_cast<N*>(call.sum_dz_x)[u] = static_cast<N>(sums.dz_x);
        }
    }

    void write_out(int64_t section, Range runs, bool rest, const N* column, const N* kept) {
        Output<T> to_x(call.stream), to_residual(call.stream);
        const auto write = [&](int64_t run, int64_t width) {
            if (kept)
                write_run(from_kept, kept + place_of(runs, run), section, run, width, column, to_x, to_residual);
            else
                write_run(gradient, dy + g.start(section, run), section, run, width, column, to_x, to_residual);
        };
        if (rest) write(g.runs, g.rest * work.c);
        backwards(g, runs, [&](int64_t run) { write(run, g.width); });
    }

    template <class Leaf, class D>
    void write_run(Leaf leaf, const D* given, int64_t section, int64_t run, int64_t width, const N* column,
                   Output<T>& to_x, Output<T>& to_residual) {
        const int64_t start = g.start(section, run);
        T *dx = static_cast<T*>(call.dx), *dr = static_cast<T*>(call.dresidual);
        for (int64_t i = 0; i < width; i += Output<T>::kRoom) {
            const int64_t n = width - i < Output<T>::kRoom ? width - i : Output<T>::kRoom, here = start + i;
            const auto from = [=](Column which) { return column + which * g.padded + i; };
            leaf(work, x + here, given + i, residual ? residual + here : nullptr,
                 call.bits ? bits(section, run) + i / 8 : nullptr, dx ? to_x.room(dx + here, n) : nullptr,
                 dr ? to_residual.room(dr + here, n) : nullptr, 1, n,
                 {from(kP), from(kQ), from(kR), from(kScale), from(kShift)});
        }
    }

    void over_samples() {
        const int64_t pooled = g.pooled();
        for (int64_t u = 0; u < work.groups; ++u)
            for (int64_t c = u * pooled; c < (u + 1) * pooled; ++c) {
                double dz = 0, dz_x = 0;
                for (int64_t n = 0; n < work.n; ++n) {
                    dz += totals[n * 2 * work.c + c];
                    dz_x += totals[(n * 2 + 1) * work.c + c] * rstd(n * work.groups + u);
                }
                write(call.dweight, work.weight_type, c, dz_x);
                write(call.dbias, work.weight_type, c, dz);
            }
    }

    const Work& work;
    const Backward& call;
    const Geometry g;
    const T *x, *dy, *residual;
    typename TileSums<T>::Leaf sum;
    typename Gradient<T, Per::element>::Leaf gradient;
    typename Gradient<T, Per::element, N>::Leaf from_kept;
    N* sums;
    double* gathered;
    N* columns;
    double* totals;
};

}  // namespace

void columns_forward(const Work& work, const Forward& call) {
    by_type(work.type, [&](auto value) { Forwards<decltype(value)>(work, call).run(); });
}

void columns_backward(const Work& work, const Backward& call) {
    by_type(work.type, [&](auto value) { Backwards<decltype(value)>(work, call).run(); });
}

}  // namespace normkit::NORMKIT_ISA
