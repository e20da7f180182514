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

constexpr int kBlock = 64;  // statistics that one thread has in hand at most

// A statistic is pooled over `planes` planes of `length` elements.
struct Geometry {
    explicit Geometry(const Work& w, int threads)
        : work(w), length(w.s), statistics(w.statistics()), planes(w.groups ? w.c / w.groups : w.n) {
        // Samples follow each other at a distance of c planes: neighbouring channels are taken together until what is
        // read in one go is worth a page.
        const int64_t enough = w.groups ? 1 : (2048 + length) / length;
        const int64_t fair = statistics / (4 * threads);
        block = enough < fair ? enough : fair;
        block = block < 1 ? 1 : block > kBlock ? kBlock : block;
        split = threads > 1 && statistics < 4 * threads && statistics % threads && planes >= threads;
    }
    int64_t plane(int64_t u, int64_t k) const { return work.groups ? u * planes + k : k * work.c + u; }
    int64_t channel(int64_t u, int64_t k) const { return work.groups ? u % work.groups * planes + k : u; }

    const Work& work;
    int64_t length, statistics, planes;
    int64_t block;
    bool split;  // too few statistics for the threads: all threads share each of them
};

// Calls body(first statistic, one past the last, planes, thread) for what this thread has to do.
template <class Body> void divide(const Geometry& geometry, int threads, Body body) {
    const int64_t blocks = (geometry.statistics + geometry.block - 1) / geometry.block;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        const Range mine = geometry.split ? Range{0, blocks} : share(blocks, me, all);
        const Range planes = geometry.split ? share(geometry.planes, me, all) : Range{0, geometry.planes};
        for (int64_t b = mine.begin; b < mine.end; ++b) {
            const int64_t end = (b + 1) * geometry.block;
            body(b * geometry.block, end < geometry.statistics ? end : geometry.statistics, planes, me, all);
        }
        fence();
    }
}

template <class T> class Forwards {
    using N = Number<T>;

  public:
    Forwards(const Work& work, const Forward& call)
        : work(work), call(call), geometry(work, call.threads), x(static_cast<const T*>(call.x)),
          apply(Apply<T, N>::pick(work)),
          partial(static_cast<Moments*>(scratch(0, sizeof(Moments) * kBlock * call.threads))) {}

    void run() {
        divide(geometry, call.threads, [this](int64_t u0, int64_t u1, Range planes, int me, int all) {
            Moments moments[kBlock];
            if (work.batch && (call.steps & first)) {
                measure(u0, u1, planes, moments);
                if (geometry.split) together(u1 - u0, moments, me, all);
                for (int64_t u = u0; u < u1; ++u) finish(u, moments[u - u0], !geometry.split || me == 0);
            }
            if (call.steps & second) write_out(u0, u1, planes);
        });
    }

  private:
    void measure(int64_t u0, int64_t u1, Range planes, Moments* out) {
        Gathering<T> gathering[kBlock];
        for (int64_t u = u0; u < u1; ++u) gathering[u - u0].shift = near_mean(u, planes);
        for (int64_t k = planes.begin; k < planes.end; ++k)
            for (int64_t u = u0; u < u1; ++u)
                gathering[u - u0].add(x + geometry.plane(u, k) * geometry.length, geometry.length);
        for (int64_t u = u0; u < u1; ++u) {
            gathering[u - u0].settle();
            out[u - u0] = gathering[u - u0].moments;
        }
    }

    // The mean of the first few hundred values: a shift from which squares lose nothing.
    N near_mean(int64_t u, Range planes) {
        double sum = 0, count = 0;
        for (int64_t k = planes.begin; k < planes.end && count < 512; ++k) {
            const int64_t n = geometry.length < 2048 ? geometry.length : 2048;
            sum += run_sum<T>(x + geometry.plane(u, k) * geometry.length, n);
            count += static_cast<double>(n);
        }
        return static_cast<N>(count ? sum / count : 0);
    }

    void together(int64_t n, Moments* moments, int me, int all) {
        for (int64_t i = 0; i < n; ++i) partial[me * kBlock + i] = moments[i];
#pragma omp barrier
        for (int64_t i = 0; i < n; ++i) {
            moments[i] = Moments{};
            for (int t = 0; t < all; ++t) {
                const Moments& part = partial[t * kBlock + i];
                moments[i].merge(part.count, part.mean, part.m2);
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
        if (geometry.split) {
#pragma omp barrier
        }
    }

    void write_out(int64_t u0, int64_t u1, Range planes) {
        Output<T> output(call.stream);
        const int64_t padded = bit_bytes(geometry.length);
        for (int64_t k = planes.end; k-- > planes.begin;)
            for (int64_t u = u0; u < u1; ++u) {
                const int64_t c = geometry.channel(u, k), plane = geometry.plane(u, k);
                const Affine a = affine(static_cast<N*>(call.mean)[u], static_cast<N*>(call.rstd)[u],
                                        read(call.weight, work.weight_type, c, 1),
                                        read(call.bias, work.weight_type, c, 0));
                for (int64_t i = 0; i < geometry.length; i += Output<T>::kRoom) {
                    const int64_t left = geometry.length - i, n = left < Output<T>::kRoom ? left : Output<T>::kRoom;
                    const int64_t here = plane * geometry.length + i;
                    apply(work, x + here, call.residual ? static_cast<const T*>(call.residual) + here : nullptr,
                          output.room(static_cast<T*>(call.y) + here, n),
                          call.bits ? call.bits + plane * padded + i / 8 : nullptr, n, static_cast<N>(a.scale),
                          static_cast<N>(a.shift));
                }
            }
    }

    const Work& work;
    const Forward& call;
    const Geometry geometry;
    const T* x;
    typename Apply<T, N>::Leaf apply;
    Moments* partial;
};

template <class T> class Backwards {
    using N = Number<T>;
    struct Pair {
        double dz, dz_x;
    };

  public:
    Backwards(const Work& work, const Backward& call)
        : work(work), call(call), geometry(work, call.threads), x(static_cast<const T*>(call.x)),
          dy(static_cast<const T*>(call.dy)), residual(static_cast<const T*>(call.residual)),
          sum(RunSums<T>::pick(work)), gradient(Gradient<T, N>::pick(work)),
          partial(static_cast<Pair*>(scratch(0, sizeof(Pair) * kBlock * call.threads))),
          per_plane(work.groups ? static_cast<Pair*>(scratch(1, sizeof(Pair) * work.n * work.c)) : nullptr) {}

    void run() {
        const bool sums = (call.steps & first) && (work.batch || call.dweight || call.dbias);
        divide(geometry, call.threads, [=](int64_t u0, int64_t u1, Range planes, int me, int all) {
            Pair pairs[kBlock]{};
            if (sums) {
                for_planes(u0, u1, planes, pairs);
                if (geometry.split) together(u1 - u0, pairs, me, all);
                if (!geometry.split || me == 0)
                    for (int64_t u = u0; u < u1; ++u) finish(u, pairs[u - u0]);
            } else if (call.sum_dz) {
                for (int64_t u = u0; u < u1; ++u)
                    pairs[u - u0] = {static_cast<const N*>(call.sum_dz)[u], static_cast<const N*>(call.sum_dz_x)[u]};
            }
            if ((call.steps & second) && (call.dx || call.dresidual)) write_out(u0, u1, planes, pairs);
            if (geometry.split) {
#pragma omp barrier
            }
        });
        if (work.groups && sums) over_samples();
    }

  private:
    N mean(int64_t u) const { return static_cast<const N*>(call.mean)[u]; }
    N rstd(int64_t u) const { return static_cast<const N*>(call.rstd)[u]; }
    double weight(int64_t c) const { return read(call.weight, work.weight_type, c, 1); }
    Affine forward_affine(int64_t u, int64_t c) const {
        return affine(mean(u), rstd(u), weight(c), read(call.bias, work.weight_type, c, 0));
    }
    const uint8_t* bits(int64_t plane) const {
        return call.bits ? call.bits + plane * bit_bytes(geometry.length) : nullptr;
    }

    void for_planes(int64_t u0, int64_t u1, Range planes, Pair* out) {
        Summing<T> summing[kBlock];
        for (int64_t k = planes.begin; k < planes.end; ++k)
            for (int64_t u = u0; u < u1; ++u) {
                Summing<T>& s = summing[u - u0];
                const int64_t plane = geometry.plane(u, k), c = geometry.channel(u, k);
                const Affine a = forward_affine(u, c);
                for (int64_t i = 0; i < geometry.length; i += kStretch) {
                    const int64_t n = geometry.length - i < kStretch ? geometry.length - i : kStretch;
                    const int64_t here = plane * geometry.length + i;
                    sum(work, x + here, dy + here, residual ? residual + here : nullptr,
                        call.bits ? bits(plane) + i / 8 : nullptr, n, mean(u), static_cast<N>(a.scale),
                        static_cast<N>(a.shift), s.sums);
                    s.pending += n;
                    if (s.pending >= kStretch) s.settle();
                }
                if (work.groups) {
                    s.settle();
                    per_plane[plane] = {s.dz, s.dz_x};
                    out[u - u0].dz += weight(c) * s.dz;
                    out[u - u0].dz_x += weight(c) * s.dz_x;
                    s = Summing<T>{};
                }
            }
        if (work.groups) return;
        for (int64_t u = u0; u < u1; ++u) {
            summing[u - u0].settle();
            out[u - u0] = {summing[u - u0].dz, summing[u - u0].dz_x};
        }
    }

    void together(int64_t n, Pair* pairs, int me, int all) {
        for (int64_t i = 0; i < n; ++i) partial[me * kBlock + i] = pairs[i];
#pragma omp barrier
        for (int64_t i = 0; i < n; ++i) {
            pairs[i] = {};
            for (int t = 0; t < all; ++t) {
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

    void write_out(int64_t u0, int64_t u1, Range planes, const Pair* pairs) {
        Output<T> to_x(call.stream), to_residual(call.stream);
        for (int64_t k = planes.end; k-- > planes.begin;)
            for (int64_t u = u0; u < u1; ++u) {
                const int64_t plane = geometry.plane(u, k), c = geometry.channel(u, k);
                const Affine a = forward_affine(u, c);
                // With one weight per statistic the sums lack it so far; groups carry theirs inside.
                const double factor = (work.groups ? 1 : weight(c)) / call.count;
                const Slopes g = slopes(work, mean(u), rstd(u), weight(c), pairs[u - u0].dz * factor,
                                        pairs[u - u0].dz_x * factor);
                const typename Gradient<T, N>::Coefficients coefficients{
                    static_cast<N>(g.p), static_cast<N>(g.q), static_cast<N>(g.r), static_cast<N>(a.scale),
                    static_cast<N>(a.shift)};
                for (int64_t i = 0; i < geometry.length; i += Output<T>::kRoom) {
                    const int64_t left = geometry.length - i, n = left < Output<T>::kRoom ? left : Output<T>::kRoom;
                    const int64_t here = plane * geometry.length + i;
                    T* dx = static_cast<T*>(call.dx);
                    T* dr = static_cast<T*>(call.dresidual);
                    gradient(work, x + here, dy + here, residual ? residual + here : nullptr,
                             call.bits ? bits(plane) + i / 8 : nullptr, dx ? to_x.room(dx + here, n) : nullptr,
                             dr ? to_residual.room(dr + here, n) : nullptr, n, coefficients);
                }
            }
    }

    // Groups: each sample has its own sums; the parameters' gradients add them up, always in the same order.
    void over_samples() {
        for (int64_t c = 0; c < work.c; ++c) {
            double dz = 0, dz_x = 0;
            for (int64_t n = 0; n < work.n; ++n) {
                const Pair& pair = per_plane[n * work.c + c];
                dz += pair.dz;
                dz_x += pair.dz_x * rstd((n * work.c + c) / geometry.planes);
            }
            write(call.dweight, work.weight_type, c, dz_x);
            write(call.dbias, work.weight_type, c, dz);
        }
    }

    const Work& work;
    const Backward& call;
    const Geometry geometry;
    const T *x, *dy, *residual;
    typename RunSums<T>::Leaf sum;
    typename Gradient<T, N>::Leaf gradient;
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
