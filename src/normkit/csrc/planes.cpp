// Statistics over planes: (n, c, s) with the values of one channel of one sample side by side.
//
// One thread owns a few statistics from the first read to the last write, so that the second read comes from its
// second-level cache; the planes are visited backwards the second time, because the last ones read are still there.
#include <omp.h>

#include "moments.h"
#include "output.h"
#include "weights.h"

namespace normkit::NORMKIT_ISA {
namespace {

constexpr int kBlock = 64;  // runs that one thread has in hand at most

// A statistic is pooled over `planes` planes of `length` elements.
struct Geometry {
    Geometry(const Work& w, int threads, int64_t room)
        : work(w), length(w.s), statistics(w.statistics()), planes(w.groups ? w.c / w.groups : w.n) {
        const int64_t fits = room / length;
        together = fits < 1 ? 1 : fits > kBlock ? kBlock : fits;
        // Samples follow each other at a distance of c planes: neighbouring channels are taken together until what is
        // read in one go is worth a page.
        const int64_t fair = statistics / (4 * threads);
        block = w.groups || fair < 1 ? 1 : together < fair ? together : fair;
        split = threads > 1 && statistics < 4 * threads && statistics % threads && planes >= threads;
    }

    const Work& work;
    int64_t length, statistics, planes;
    int64_t together;  // planes side by side that go through an inner loop at once
    int64_t block;     // statistics that a thread has in hand
    bool split;        // too few statistics for the threads: all threads share each of them
};

// Planes that lie side by side: of one statistic, or one of each of several.
struct Chunk {
    int64_t plane, runs, statistic, channel;  // the first one's
    int64_t order;                            // elements of this thread's part of the block that come before it
};

// What a thread has in hand: statistics from u0 to u1, of which it takes some of the planes.
struct Share {
    const Geometry& g;
    int64_t u0, u1;
    Range planes;
    int me, all;

    int64_t elements() const { return (planes.end - planes.begin) * (u1 - u0) * g.length; }
    bool writes() const { return !g.split || me == 0; }

    template <class Step> void forwards(Step step) const { visit(step, false); }
    template <class Step> void backwards(Step step) const { visit(step, true); }

  private:
    template <class Step> void visit(Step step, bool down) const {
        const int64_t stride = g.work.groups ? g.together : 1, count = planes.end - planes.begin;
        for (int64_t i = 0, turns = (count + stride - 1) / stride; i < turns; ++i) {
            const int64_t before = (down ? turns - 1 - i : i) * stride, k = planes.begin + before;
            if (g.work.groups)
                step(Chunk{u0 * g.planes + k, planes.end - k < stride ? planes.end - k : stride, u0,
                           u0 % g.work.groups * g.planes + k, before * g.length});
            else
                step(Chunk{k * g.work.c + u0, u1 - u0, u0, u0, before * (u1 - u0) * g.length});
        }
    }
};

// Calls body(share) for what this thread has to do, and then, when all are through, last(thread, threads).
template <class Body, class Last> void divide(const Geometry& g, int threads, Body body, Last last) {
    const int64_t blocks = (g.statistics + g.block - 1) / g.block;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        const Range mine = g.split ? Range{0, blocks} : share(blocks, me, all);
        const Range planes = g.split ? share(g.planes, me, all) : Range{0, g.planes};
        for (int64_t b = mine.begin; b < mine.end; ++b) {
            const int64_t end = (b + 1) * g.block;
            body(Share{g, b * g.block, end < g.statistics ? end : g.statistics, planes, me, all});
        }
        fence();
        if (g.work.groups) {
#pragma omp barrier
            last(me, all);
        }
    }
}

template <class T> class Forwards {
    using N = Number<T>;

  public:
    Forwards(const Work& work, const Forward& call)
        : work(work), call(call), g(work, call.threads, Output<T>::kRoom), x(static_cast<const T*>(call.x)),
          apply(Apply<T, Per::run>::pick(work)),
          partial(static_cast<Moments*>(scratch(0, sizeof(Moments) * kBlock * call.threads))) {}

    void run() {
        divide(
            g, call.threads,
            [this](const Share& mine) {
                if (work.batch && (call.steps & first)) {
                    Moments moments[kBlock];
                    measure(mine, moments);
                    if (g.split) together(mine, moments);
                    for (int64_t u = mine.u0; u < mine.u1; ++u) finish(u, moments[u - mine.u0], mine.writes());
                }
                if (call.steps & second) write_out(mine);
            },
            [](int, int) {});
    }

  private:
    void measure(const Share& mine, Moments* moments) {
        Lanes<T> sums[kBlock][2];
        N shift[kBlock];
        const int64_t n = mine.u1 - mine.u0;
        for (int64_t i = 0; i < n; ++i) {
            shift[i] = near_mean(mine, i);
            sums[i][0] = sums[i][1] = Lanes<T>{};
        }
        int64_t pending = 0;
        const auto settle = [&] {
            if (!pending) return;
            for (int64_t i = 0; i < n; ++i)
                normkit::NORMKIT_ISA::settle<T>(sums[i], static_cast<double>(pending), shift[i], moments[i]);
            pending = 0;
        };
        mine.forwards([&](const Chunk& chunk) {
            // The planes of a group lie side by side, and all of them have the one mean.
            const int64_t length = work.groups ? chunk.runs * g.length : g.length;
            for (int64_t i = 0; i < length; i += kStretch) {
                const int64_t left = length - i < kStretch ? length - i : kStretch;
                run_moments<T>(x + chunk.plane * g.length + i, n, left, shift, sums);
                if ((pending += left) >= kStretch) settle();
            }
        });
        settle();
    }

    // The mean of the first few hundred values: a shift from which squares lose nothing.
    N near_mean(const Share& mine, int64_t i) {
        const int64_t n = g.length < kProbe ? g.length : kProbe, stride = work.groups ? 1 : work.c;
        const int64_t start =
            work.groups ? mine.u0 * g.planes + mine.planes.begin : mine.planes.begin * work.c + mine.u0 + i;
        double sum = 0, count = 0;
        for (int64_t k = 0; k < mine.planes.end - mine.planes.begin && count < kProbe; ++k) {
            sum += run_sum<T>(x + (start + k * stride) * g.length, n);
            count += static_cast<double>(n);
        }
        return static_cast<N>(count ? sum / count : 0);
    }
    static constexpr int64_t kProbe = 256;

    void together(const Share& mine, Moments* moments) {
        for (int64_t i = 0; i < mine.u1 - mine.u0; ++i) partial[mine.me * kBlock + i] = moments[i];
#pragma omp barrier
        for (int64_t i = 0; i < mine.u1 - mine.u0; ++i) {
            moments[i] = Moments{};
            for (int t = 0; t < mine.all; ++t) {
                const Moments& other = partial[t * kBlock + i];
                moments[i].merge(other.count, other.mean, other.m2);
            }
        }
    }

    void finish(int64_t u, const Moments& m, bool writes) {
        if (writes) {
            const double var = m.m2 / m.count;
            static_cast<N*>(call.mean)[u] = static_cast<N>(m.mean);
            static_cast<N*>(call.rstd)[u] = static_cast<N>(1 / std::sqrt(var + call.eps));
            if (call.var) static_cast<N*>(call.var)[u] = static_cast<N>(var);
            if (!work.groups) move_running<N>(call, u, m.mean, var, m.count);
        }
        if (g.split) {
#pragma omp barrier
        }
    }

    void write_out(const Share& mine) {
        Output<T> output(call.stream);
        const int64_t padded = bit_bytes(g.length);
        N scale[kBlock], shift[kBlock];
        int64_t known = -1;  // the first channel that they are of
        mine.backwards([&](const Chunk& chunk) {
            if (known != chunk.channel) {
                known = chunk.channel;
                for (int64_t i = 0; i < chunk.runs; ++i) {
                    const int64_t u = chunk.statistic + (work.groups ? 0 : i), c = chunk.channel + i;
                    const Affine a = affine(static_cast<N*>(call.mean)[u], static_cast<N*>(call.rstd)[u],
                                            read(call.weight, work.weight_type, c, 1),
                                            read(call.bias, work.weight_type, c, 0));
                    scale[i] = static_cast<N>(a.scale), shift[i] = static_cast<N>(a.shift);
                }
            }
            for (int64_t i = 0; i < g.length; i += Output<T>::kRoom) {
                const int64_t left = g.length - i, n = left < Output<T>::kRoom ? left : Output<T>::kRoom;
                const int64_t here = chunk.plane * g.length + i;
                apply(work, x + here, call.residual ? static_cast<const T*>(call.residual) + here : nullptr,
                      output.room(static_cast<T*>(call.y) + here, chunk.runs * n),
                      call.bits ? call.bits + chunk.plane * padded + i / 8 : nullptr, chunk.runs, n, scale, shift);
            }
        });
    }

    const Work& work;
    const Forward& call;
    const Geometry g;
    const T* x;
    typename Apply<T, Per::run>::Leaf apply;
    Moments* partial;
};

template <class T> class Backwards {
    using N = Number<T>;
    struct Pair {
        double dz, dz_x;
    };

  public:
    Backwards(const Work& work, const Backward& call)
        : work(work), call(call), g(work, call.threads, Output<T>::kRoom), x(static_cast<const T*>(call.x)),
          dy(static_cast<const T*>(call.dy)), residual(static_cast<const T*>(call.residual)),
          sum(RunSums<T>::pick(work)), gradient(Gradient<T, Per::run>::pick(work)),
          from_kept(Gradient<T, Per::run, N>::template leaf<Gate::none>),
          partial(static_cast<Pair*>(scratch(0, sizeof(Pair) * kBlock * call.threads))),
          per_plane(work.groups ? static_cast<Pair*>(scratch(1, sizeof(Pair) * work.n * work.c)) : nullptr) {}

    void run() {
        const bool sums = (call.steps & first) && (work.batch || call.dweight || call.dbias);
        const bool writes = (call.steps & second) && (call.dx || call.dresidual);
        const int64_t most = g.block * g.planes * g.length, room = most < kKept ? most : kKept;
        N* const all_kept = sums && writes && curved(work)
                                ? static_cast<N*>(scratch(2, sizeof(N) * static_cast<size_t>(room * call.threads)))
                                : nullptr;
        divide(
            g, call.threads,
            [=](const Share& mine) {
                Pair pairs[kBlock]{};
                N* kept = all_kept && mine.elements() <= room ? all_kept + mine.me * room : nullptr;
                if (sums) {
                    measure(mine, kept, pairs);
                    if (g.split) together(mine, pairs);
                    if (mine.writes())
                        for (int64_t u = mine.u0; u < mine.u1; ++u) finish(u, pairs[u - mine.u0]);
                } else if (call.sum_dz) {
                    for (int64_t u = mine.u0; u < mine.u1; ++u)
                        pairs[u - mine.u0] = {static_cast<const N*>(call.sum_dz)[u],
                                              static_cast<const N*>(call.sum_dz_x)[u]};
                }
                if (writes) write_out(mine, kept, pairs);
                if (g.split) {
#pragma omp barrier
                }
            },
            [=](int me, int all) {
                if (sums) over_samples(share(work.c, me, all));
            });
    }

  private:
    // What the inner loops need to know of the runs of a chunk.
    struct Numbers {
        int64_t known = -1;  // the first channel that they are of
        N mean[kBlock], scale[kBlock], shift[kBlock], p[kBlock], q[kBlock], r[kBlock];
    };

    N mean(int64_t u) const { return static_cast<const N*>(call.mean)[u]; }
    N rstd(int64_t u) const { return static_cast<const N*>(call.rstd)[u]; }
    double weight(int64_t c) const { return read(call.weight, work.weight_type, c, 1); }
    const uint8_t* bits(int64_t plane, int64_t i) const {
        return call.bits ? call.bits + plane * bit_bytes(g.length) + i / 8 : nullptr;
    }

    // `pairs`: null where the slopes are not asked for.
    void learn(const Chunk& chunk, const Pair* pairs, Numbers& out) const {
        if (out.known == chunk.channel) return;
        out.known = chunk.channel;
        for (int64_t i = 0; i < chunk.runs; ++i) {
            const int64_t own = work.groups ? 0 : i, u = chunk.statistic + own, c = chunk.channel + i;
            const double w = weight(c);
            const Affine a = affine(mean(u), rstd(u), w, read(call.bias, work.weight_type, c, 0));
            out.mean[i] = mean(u), out.scale[i] = static_cast<N>(a.scale), out.shift[i] = static_cast<N>(a.shift);
            if (!pairs) continue;
            // With one weight per statistic the sums lack it so far; groups carry theirs inside.
            const double factor = (work.groups ? 1 : w) / call.count;
            const Slopes s = slopes(work, mean(u), rstd(u), w, pairs[own].dz * factor, pairs[own].dz_x * factor);
            out.p[i] = static_cast<N>(s.p), out.q[i] = static_cast<N>(s.q), out.r[i] = static_cast<N>(s.r);
        }
    }

    void measure(const Share& mine, N* kept, Pair* pairs) {
        Lanes<T> sums[kBlock][2];
        Numbers numbers;
        int64_t pending = 0;
        for (int64_t i = 0; i < g.together; ++i) sums[i][0] = sums[i][1] = Lanes<T>{};
        const auto settle = [&](int64_t i) {
            const Pair pair{total(sums[i][0]), total(sums[i][1])};
            sums[i][0] = sums[i][1] = Lanes<T>{};
            return pair;
        };
        const auto settle_all = [&] {
            for (int64_t i = 0; i < mine.u1 - mine.u0; ++i) {
                const Pair pair = settle(i);
                pairs[i].dz += pair.dz, pairs[i].dz_x += pair.dz_x;
            }
            pending = 0;
        };
        mine.forwards([&](const Chunk& chunk) {
            learn(chunk, nullptr, numbers);
            for (int64_t i = 0; i < g.length; i += kStretch) {
                const int64_t n = g.length - i < kStretch ? g.length - i : kStretch;
                const int64_t here = chunk.plane * g.length + i;
                sum(work, x + here, dy + here, residual ? residual + here : nullptr, bits(chunk.plane, i),
                    kept ? kept + chunk.order + i : nullptr, chunk.runs, n, numbers.mean, numbers.scale, numbers.shift,
                    sums);
                if (work.groups)
                    for (int64_t k = 0; k < chunk.runs; ++k) {
                        const Pair pair = settle(k);
                        Pair& own = per_plane[chunk.plane + k];
                        own = i ? Pair{own.dz + pair.dz, own.dz_x + pair.dz_x} : pair;
                        const double w = weight(chunk.channel + k);
                        pairs[0].dz += w * pair.dz, pairs[0].dz_x += w * pair.dz_x;
                    }
                else if ((pending += n) >= kStretch)
                    settle_all();
            }
        });
        if (!work.groups) settle_all();
    }

    void together(const Share& mine, Pair* pairs) {
        for (int64_t i = 0; i < mine.u1 - mine.u0; ++i) partial[mine.me * kBlock + i] = pairs[i];
#pragma omp barrier
        for (int64_t i = 0; i < mine.u1 - mine.u0; ++i) {
            pairs[i] = {};
            for (int t = 0; t < mine.all; ++t) {
                pairs[i].dz += partial[t * kBlock + i].dz;
                pairs[i].dz_x += partial[t * kBlock + i].dz_x;
            }
        }
    }

    void finish(int64_t u, const Pair& sums) {
        if (call.sum_dz) static_cast<N*>(call.sum_dz)[u] = static_cast<N>(sums.dz);
        if (call.sum_dz_x) static_cast<N*>(call.sum_dz_x)[u] = static_cast<N>(sums.dz_x);
        if (work.groups) return;
        write(call.dweight, work.weight_type, u, sums.dz_x * rstd(u));
        write(call.dbias, work.weight_type, u, sums.dz);
    }

    void write_out(const Share& mine, const N* kept, const Pair* pairs) {
        Output<T> to_x(call.stream), to_residual(call.stream);
        Numbers numbers;
        mine.backwards([&](const Chunk& chunk) {
            learn(chunk, pairs, numbers);
            const auto go = [&](auto leaf, const auto* given, int64_t i, int64_t n) {
                const int64_t here = chunk.plane * g.length + i;
                T *dx = static_cast<T*>(call.dx), *dr = static_cast<T*>(call.dresidual);
                leaf(work, x + here, given, residual ? residual + here : nullptr, bits(chunk.plane, i),
                     dx ? to_x.room(dx + here, chunk.runs * n) : nullptr,
                     dr ? to_residual.room(dr + here, chunk.runs * n) : nullptr, chunk.runs, n,
                     {numbers.p, numbers.q, numbers.r, numbers.scale, numbers.shift});
            };
            for (int64_t i = 0; i < g.length; i += Output<T>::kRoom) {
                const int64_t left = g.length - i, n = left < Output<T>::kRoom ? left : Output<T>::kRoom;
                if (kept)
                    go(from_kept, kept + chunk.order + i, i, n);
                else
                    go(gradient, dy + chunk.plane * g.length + i, i, n);
            }
        });
    }

    // Groups: each sample has its own sums; the parameters' gradients add them up, always in the same order.
    void over_samples(Range channels) {
        for (int64_t c = channels.begin; c < channels.end; ++c) {
            double dz = 0, dz_x = 0;
            for (int64_t n = 0; n < work.n; ++n) {
                const Pair& pair = per_plane[n * work.c + c];
                dz += pair.dz;
                dz_x += pair.dz_x * rstd((n * work.c + c) / g.planes);
            }
            write(call.dweight, work.weight_type, c, dz_x);
            write(call.dbias, work.weight_type, c, dz);
        }
    }

    const Work& work;
    const Backward& call;
    const Geometry g;
    const T *x, *dy, *residual;
    typename RunSums<T>::Leaf sum;
    typename Gradient<T, Per::run>::Leaf gradient;
    typename Gradient<T, Per::run, N>::Leaf from_kept;
    Pair *partial, *per_plane;
};

}  // namespace

void planes_forward(const Work& work, const Forward& call) {
    by_type(work.type, [&](auto value) { Forwards<decltype(value)>(work, call).run(); });
}

void planes_backward(const Work& work, const Backward& call) {
    by_type(work.type, [&](auto value) { Backwards<decltype(value)>(work, call).run(); });
}

}  // namespace normkit::NORMKIT_ISA
