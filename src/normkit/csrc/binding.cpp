// The Python module: addresses and numbers in, nothing out. It knows nothing of torch; who calls it owns the tensors.
#include <cmath>
#include <cstring>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "memory.h"
#include "work.h"

namespace nb = nanobind;
using namespace normkit;

namespace {

constexpr int64_t kPerThread = 16384;  // elements that are worth waking another thread for
constexpr int64_t kHoldLock = 65536;   // elements below which giving the interpreter lock back costs more than it helps

template <class P> P* pointer(uintptr_t address) { return reinterpret_cast<P*>(address); }

int useful(int threads, int64_t elements) {
    const int64_t most = 1 + elements / kPerThread;
    return threads < most ? threads : static_cast<int>(most);
}

class Kernel {
  public:
    Kernel(int shape, int type, int weight_type, int activation, double slope, bool residual, bool center, bool batch,
           int64_t n, int64_t c, int64_t s, int64_t groups)
        : work_{static_cast<Shape>(shape), static_cast<Type>(type), static_cast<Type>(weight_type),
                static_cast<Activation>(activation), slope, residual, center, batch, n, c, s, groups},
          number_(work_.type == Type::f64 ? 8 : 4),
          bytes_(static_cast<size_t>(work_.elements()) * (work_.type == Type::f64 ? 8 : work_.type == Type::f32 ? 4 : 2)) {}

    int64_t bits() const { return bits_needed(work_); }
    int64_t statistics() const { return work_.statistics(); }

    // `stats` holds the means, then the inverse deviations.
    void forward(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t bits,
                 uintptr_t stats, uintptr_t running_mean, uintptr_t running_var, double momentum, double eps,
                 int threads) const {
        Forward call{};
        call.x = pointer<void>(x), call.residual = pointer<void>(residual);
        call.weight = pointer<void>(weight), call.bias = pointer<void>(bias);
        call.y = pointer<void>(y), call.bits = pointer<uint8_t>(bits);
        call.mean = pointer<void>(stats), call.rstd = pointer<void>(stats + number_ * work_.statistics());
        call.momentum = momentum, call.eps = eps, call.steps = fused;
        if (work_.batch)
            call.running_mean = pointer<void>(running_mean), call.running_var = pointer<void>(running_var);
        else if (running_mean)
            given(running_mean, running_var, call);
        run(call, threads);
    }

    // The first half: means and (biased) variances, so that they can be merged or exchanged.
    void moments(uintptr_t x, uintptr_t stats, uintptr_t var, double eps, int threads) const {
        Forward call{};
        call.x = pointer<void>(x), call.var = pointer<void>(var);
        call.mean = pointer<void>(stats), call.rstd = pointer<void>(stats + number_ * work_.statistics());
        call.eps = eps, call.steps = first;
        run(call, threads);
    }

    // The second half, with the means and inverse deviations in `stats`.
    void normalise(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t bits,
                   uintptr_t stats, int threads) const {
        Forward call{};
        call.x = pointer<void>(x), call.residual = pointer<void>(residual);
        call.weight = pointer<void>(weight), call.bias = pointer<void>(bias);
        call.y = pointer<void>(y), call.bits = pointer<uint8_t>(bits);
        call.mean = pointer<void>(stats), call.rstd = pointer<void>(stats + number_ * work_.statistics());
        call.steps = second;
        run(call, threads);
    }

    // `sums` holds the sums of dz, then of dz (x - mean); null where nobody wants them. steps: 1, 2, or 3 for both.
    void backward(uintptr_t x, uintptr_t dy, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t stats,
                  uintptr_t bits, uintptr_t dx, uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias,
                  uintptr_t sums, double count, int steps, int threads) const {
        Backward call{};
        call.x = pointer<void>(x), call.dy = pointer<void>(dy), call.residual = pointer<void>(residual);
        call.weight = pointer<void>(weight), call.bias = pointer<void>(bias);
        call.mean = pointer<void>(stats), call.rstd = pointer<void>(stats + number_ * work_.statistics());
        call.bits = pointer<uint8_t>(bits);
        call.dx = pointer<void>(dx), call.dresidual = pointer<void>(dresidual);
        call.dweight = pointer<void>(dweight), call.dbias = pointer<void>(dbias);
        call.sum_dz = pointer<void>(sums);
        call.sum_dz_x = sums ? pointer<void>(sums + number_ * work_.statistics()) : nullptr;
        call.count = count ? count : static_cast<double>(work_.values());
        call.steps = steps, call.threads = useful(threads, work_.elements()), call.stream = bytes_ >= stream_above();
        advise(call.dx, bytes_);
        advise(call.dresidual, bytes_);
        if (work_.elements() < kHoldLock) return normkit::backward(work_, call);
        nb::gil_scoped_release unlocked;
        normkit::backward(work_, call);
    }

  private:
    void run(Forward& call, int threads) const {
        call.threads = useful(threads, work_.elements()), call.stream = bytes_ >= stream_above();
        advise(call.y, bytes_);
        if (work_.elements() < kHoldLock) return normkit::forward(work_, call);
        nb::gil_scoped_release unlocked;
        normkit::forward(work_, call);
    }

    void given(uintptr_t running_mean, uintptr_t running_var, Forward& call) const {
        if (number_ == 8) return given<double>(running_mean, running_var, call);
        given<float>(running_mean, running_var, call);
    }
    template <class N> void given(uintptr_t mean, uintptr_t var, Forward& call) const {
        for (int64_t i = 0; i < work_.statistics(); ++i) {
            static_cast<N*>(call.mean)[i] = pointer<N>(mean)[i];
            static_cast<N*>(call.rstd)[i] = static_cast<N>(1 / std::sqrt(pointer<N>(var)[i] + call.eps));
        }
    }

    Work work_;
    size_t number_, bytes_;
};

LstmStep lstm_step(bool wide, int64_t n, int64_t h, uintptr_t before, uintptr_t gates, uintptr_t output, int threads) {
    LstmStep step{};
    step.type = wide ? Type::f64 : Type::f32, step.n = n, step.h = h;
    step.before = pointer<void>(before), step.gates = pointer<void>(gates), step.output = pointer<void>(output);
    step.threads = useful(threads, 4 * n * h);
    return step;
}

void lstm_forwards(bool wide, int64_t n, int64_t h, uintptr_t driven, uintptr_t recurrent, uintptr_t before,
                   uintptr_t gates, uintptr_t output, uintptr_t cell, int threads) {
    LstmStep step = lstm_step(wide, n, h, before, gates, output, threads);
    step.driven = pointer<void>(driven), step.recurrent = pointer<void>(recurrent), step.cell = pointer<void>(cell);
    if (4 * n * h < kHoldLock) return lstm_forward(step);
    nb::gil_scoped_release unlocked;
    lstm_forward(step);
}

void lstm_backwards(bool wide, int64_t n, int64_t h, uintptr_t before, uintptr_t gates, uintptr_t output,
                    uintptr_t dcell, uintptr_t doutput, uintptr_t dsum, uintptr_t dbefore, int threads) {
    LstmStep step = lstm_step(wide, n, h, before, gates, output, threads);
    step.dcell = pointer<void>(dcell), step.doutput = pointer<void>(doutput);
    step.dsum = pointer<void>(dsum), step.dbefore = pointer<void>(dbefore);
    if (4 * n * h < kHoldLock) return lstm_backward(step);
    nb::gil_scoped_release unlocked;
    lstm_backward(step);
}

// Copies what is proposed into the running statistics, unless a variance among it is NaN or infinite; true: it did.
template <class N> bool settled(N* mean, N* var, const N* new_mean, const N* new_var, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (!std::isfinite(new_var[i])) return false;
    std::memcpy(mean, new_mean, sizeof(N) * static_cast<size_t>(n));
    std::memcpy(var, new_var, sizeof(N) * static_cast<size_t>(n));
    return true;
}

// Copies the running statistics to where torch's operator moves them.
void propose(bool wide, uintptr_t mean, uintptr_t var, uintptr_t new_mean, uintptr_t new_var, int64_t n) {
    const size_t bytes = (wide ? sizeof(double) : sizeof(float)) * static_cast<size_t>(n);
    std::memcpy(pointer<void>(new_mean), pointer<void>(mean), bytes);
    std::memcpy(pointer<void>(new_var), pointer<void>(var), bytes);
}

// Running statistics move to what is proposed if all of it is finite, and one of the counters goes up by one.
void settle(bool wide, uintptr_t mean, uintptr_t var, uintptr_t new_mean, uintptr_t new_var, int64_t n,
            uintptr_t tracked, uintptr_t skipped) {
    const bool moved = wide ? settled(pointer<double>(mean), pointer<double>(var), pointer<double>(new_mean),
                                      pointer<double>(new_var), n)
                            : settled(pointer<float>(mean), pointer<float>(var), pointer<float>(new_mean),
                                      pointer<float>(new_var), n);
    if (const uintptr_t counter = moved ? tracked : skipped) ++*pointer<int64_t>(counter);
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // kernels are kept per shape until the process ends, on purpose
    nb::class_<Kernel>(m, "Kernel")
        .def(nb::init<int, int, int, int, double, bool, bool, bool, int64_t, int64_t, int64_t, int64_t>())
        .def_prop_ro("bits", &Kernel::bits)
        .def_prop_ro("statistics", &Kernel::statistics)
        .def("forward", &Kernel::forward)
        .def("moments", &Kernel::moments)
        .def("normalise", &Kernel::normalise)
        .def("backward", &Kernel::backward);
    m.def("propose", &propose);
    m.def("settle", &settle);
    m.def("lstm_forward", &lstm_forwards);
    m.def("lstm_backward", &lstm_backwards);
    m.def("isa", [] { return std::string(isa()); });
    m.def("stream_above", &stream_above);
    m.def("set_stream_above", &set_stream_above);
}
