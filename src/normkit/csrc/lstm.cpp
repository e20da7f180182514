// One time step of an LSTM between its norms: what the gates make of the cell. Written by hand it is eight of torch's
// operators forwards and a dozen backwards, each on too few numbers to be worth calling.
#include "activation.h"

namespace normkit::NORMKIT_ISA {
namespace {

// tanh to about two units in the last place: near zero 1 - e^-2x would lose all its digits, so there it is a polynomial.
INLINE Floats tanh(Floats x) {
    const Floats a = x < 0.0f ? -x : x, square = x * x;
    const Floats e = exp(-2.0f * a), far = (1.0f - e) / (1.0f + e);
    Floats near = all(62.0f / 2835);
    for (float c : {-17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) near = near * square + c;
    return a < 0.25f ? x * near : (x < 0.0f ? -far : far);
}
INLINE Doubles tanh(Doubles x) {
    for (int i = 0; i < kDoubles; ++i) x[i] = std::tanh(x[i]);
    return x;
}

// each(row) for all samples, shared out among threads.
template <class Each> void rows(const LstmStep& step, Each each) {
#pragma omp parallel for num_threads(step.threads) if (step.threads > 1) schedule(static)
    for (int64_t row = 0; row < step.n; ++row) each(row);
}

template <class T> void forwards(const LstmStep& step) {
    using V = Lanes<T>;
    const int64_t h = step.h;
    rows(step, [&](int64_t row) {
        const T *driven = static_cast<const T*>(step.driven) + row * 4 * h;
        const T *recurrent = static_cast<const T*>(step.recurrent) + row * 4 * h;
        const T *before = static_cast<const T*>(step.before) + row * h;
        T *gates = static_cast<T*>(step.gates) + row * 3 * h;
        T *output = static_cast<T*>(step.output) + row * h, *cell = static_cast<T*>(step.cell) + row * h;
        sweep<width<T>, false>(h, [&](int64_t i, auto m) __attribute__((always_inline)) {
            const auto sum = [&](int gate) { return load(driven + gate * h + i, m) + load(recurrent + gate * h + i, m); };
            const V input = sigmoid(sum(0)), forget = sigmoid(sum(1)), candidate = tanh(sum(2));
            store(gates + i, input, m);
            store(gates + h + i, forget, m);
            store(gates + 2 * h + i, candidate, m);
            store(output + i, sigmoid(sum(3)), m);
            store(cell + i, forget * load(before + i, m) + input * candidate, m);
        });
    });
}

template <class T> void backwards(const LstmStep& step) {
    using V = Lanes<T>;
    const int64_t h = step.h;
    rows(step, [&](int64_t row) {
        const T *gates = static_cast<const T*>(step.gates) + row * 3 * h;
        const T *output = static_cast<const T*>(step.output) + row * h;
        const T *before = static_cast<const T*>(step.before) + row * h;
        const T *dcell = step.dcell ? static_cast<const T*>(step.dcell) + row * h : nullptr;
        const T *doutput = step.doutput ? static_cast<const T*>(step.doutput) + row * h : nullptr;
        T *dsum = static_cast<T*>(step.dsum) + row * 4 * h, *dbefore = static_cast<T*>(step.dbefore) + row * h;
        sweep<width<T>, false>(h, [&](int64_t i, auto m) __attribute__((always_inline)) {
            const V input = load(gates + i, m), forget = load(gates + h + i, m), candidate = load(gates + 2 * h + i, m);
            const V out = load(output + i, m), dc = dcell ? load(dcell + i, m) : V{};
            store(dsum + i, dc * candidate * input * (1 - input), m);
            store(dsum + h + i, dc * load(before + i, m) * forget * (1 - forget), m);
            store(dsum + 2 * h + i, dc * input * (1 - candidate * candidate), m);
            store(dsum + 3 * h + i, doutput ? load(doutput + i, m) * out * (1 - out) : V{}, m);
            store(dbefore + i, dc * forget, m);
        });
    });
}

template <class Run> void in_full_precision(Type type, Run run) {
    if (type == Type::f64) return if_there<Type::f64, double>(run);
    if_there<Type::f32, float>(run);
}

}  // namespace

void lstm_forward(const LstmStep& step) {
    in_full_precision(step.type, [&](auto t) { forwards<decltype(t)>(step); });
}
void lstm_backward(const LstmStep& step) {
    in_full_precision(step.type, [&](auto t) { backwards<decltype(t)>(step); });
}

}  // namespace normkit::NORMKIT_ISA
