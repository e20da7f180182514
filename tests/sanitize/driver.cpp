// Runs the kernels on recorded and on random cases under the address and undefined-behaviour sanitizers, and checks the numbers against
// sums written out in double. Every buffer has exactly the size it must have, so that one element too far is an error.
// `make sanitize` builds and runs it; there is no Python in the process.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "work.h"

using namespace normkit;

namespace {

std::mt19937_64 random_bits(20240917);
int64_t pick(int64_t low, int64_t high) { return low + static_cast<int64_t>(random_bits() % (high - low + 1)); }
double normal() { return std::normal_distribution<double>()(random_bits); }

size_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Exactly n numbers of a type; only float and double are looked into, narrow types are filled with finite bits.
struct Buffer {
    Buffer(Type type, int64_t n) : type(type), n(n), bytes(new char[static_cast<size_t>(n) * size_of(type)]) {}
    void fill(double scale, double offset) {
        for (int64_t i = 0; i < n; ++i) set(i, normal() * scale + offset);
    }
    void set(int64_t i, double value) {
        if (type == Type::f64) reinterpret_cast<double*>(bytes.get())[i] = value;
        if (type == Type::f32) reinterpret_cast<float*>(bytes.get())[i] = static_cast<float>(value);
        // bf16: 0x3f80 is 1; f16: 0x3c00 is 1. Some mantissa bits and a sign make them differ.
        if (size_of(type) == 2)
            reinterpret_cast<uint16_t*>(bytes.get())[i] =
                static_cast<uint16_t>((type == Type::bf16 ? 0x3f80 : 0x3c00) | (random_bits() & 0x803f));
    }
    double get(int64_t i) const {
        return type == Type::f64 ? reinterpret_cast<double*>(bytes.get())[i] : reinterpret_cast<float*>(bytes.get())[i];
    }
    Type type;
    int64_t n;
    std::unique_ptr<char[]> bytes;
};

// Which statistic and which weight belong to an element, from its place in memory.
struct Place {
    int64_t statistic, channel;
};
Place place(const Work& w, int64_t i) {
    if (w.shape == Shape::rows) return {i / w.c, i / w.c % (w.groups > 1 ? w.groups : 1) * w.c + i % w.c};
    const int64_t sample = i / (w.c * w.s), rest = i % (w.c * w.s);
    const int64_t c = w.shape == Shape::columns ? rest % w.c : rest / w.s;
    if (w.shape == Shape::tiles) return {sample * w.s + rest % w.s, c};
    return {w.groups ? sample * w.groups + c / (w.c / w.groups) : c, c};
}

void expect(double got, double wanted, double scale, const char* what, const Work& w) {
    const double tolerance = (w.type == Type::f64 ? 1e-10 : 2e-4) * (1 + scale);
    if (std::fabs(got - wanted) <= tolerance) return;
    std::fprintf(stderr, "%s: %g instead of %g (shape %d, n %ld, c %ld, s %ld, groups %ld, activation %d)\n", what, got,
                 wanted, static_cast<int>(w.shape), static_cast<long>(w.n), static_cast<long>(w.c),
                 static_cast<long>(w.s), static_cast<long>(w.groups), static_cast<int>(w.activation));
    std::exit(1);
}

// The backward pass from the output of a leaky ReLU gives what that from the input gives.
void compare_with_output_saved(const Work& w, const Forward& f, const Backward& b) {
    const int64_t elements = w.elements();
    Buffer mean(w.type, w.c), rstd(w.type, w.c), weight(w.type, w.c), dx(w.type, elements), dweight(w.type, w.c);
    const auto number = [&](const void* from, int64_t i) {
        return w.type == Type::f64 ? static_cast<const double*>(from)[i] : static_cast<const float*>(from)[i];
    };
    for (int64_t c = 0; c < w.c; ++c) {
        const double own = number(f.weight, c);
        mean.set(c, number(f.bias, c)), rstd.set(c, 1 / own), weight.set(c, own * own * number(f.rstd, c));
    }
    Work from_output = w;
    from_output.activation = Activation::leaky_relu_output;
    Backward call = b;
    call.x = f.y, call.weight = weight.bytes.get(), call.bias = nullptr;
    call.mean = mean.bytes.get(), call.rstd = rstd.bytes.get();
    call.dx = dx.bytes.get(), call.dweight = dweight.bytes.get(), call.dbias = nullptr;
    backward(from_output, call);
    // Rounding y costs |bias / weight| of its last digits beside those of every number.
    for (int64_t c = 0; c < w.c; ++c) {
        const double worse = 10 * (1 + std::fabs(number(f.bias, c) / number(f.weight, c)));
        expect(dweight.get(c), number(b.dweight, c), worse * (1 + std::fabs(number(b.dweight, c))), "weight, y", w);
    }
    for (int64_t i = 0; i < elements; ++i) {
        const int64_t c = place(w, i).channel;
        const double worse = 10 * (1 + std::fabs(number(f.bias, c) / number(f.weight, c)));
        expect(dx.get(i), number(b.dx, i), worse * std::fabs(number(f.rstd, c) * number(f.weight, c)), "input, y", w);
    }
}

void run(const Work& w, int threads, bool stream) {
    const int64_t elements = w.elements(), statistics = w.statistics();
    const int64_t channels = w.shape == Shape::rows && w.groups > 1 ? w.c * w.groups : w.c;
    const Type number = w.type == Type::f64 ? Type::f64 : Type::f32;
    Buffer x(w.type, elements), dy(w.type, elements), residual(w.type, elements), y(w.type, elements);
    Buffer dx(w.type, elements), dr(w.type, elements), weight(w.weight_type, channels), bias(w.weight_type, channels);
    Buffer dweight(w.weight_type, channels), dbias(w.weight_type, channels);
    Buffer mean(number, statistics), rstd(number, statistics);
    std::unique_ptr<uint8_t[]> bits(new uint8_t[static_cast<size_t>(bits_needed(w)) + 1]);
    x.fill(3, 2), dy.fill(1, 0), residual.fill(2, -1), weight.fill(0.3, 1), bias.fill(1, 0.5);
    for (int64_t i = 0; i < channels && size_of(w.weight_type) > 2; ++i)
        if (std::fabs(weight.get(i)) < 0.2) weight.set(i, 0.2);  // what is saved of the output is divided by it
    if (!w.batch) mean.fill(1, 2), rstd.fill(0.01, 0.4);

    Forward f{};
    f.x = x.bytes.get(), f.residual = w.residual ? residual.bytes.get() : nullptr;
    f.weight = weight.bytes.get(), f.bias = bias.bytes.get(), f.y = y.bytes.get();
    f.bits = bits_needed(w) ? bits.get() : nullptr;
    f.mean = mean.bytes.get(), f.rstd = rstd.bytes.get();
    f.eps = 1e-5, f.steps = fused, f.threads = threads, f.stream = stream;
    forward(w, f);

    Backward b{};
    b.x = f.x, b.dy = dy.bytes.get(), b.weight = f.weight, b.bias = f.bias, b.mean = f.mean, b.rstd = f.rstd;
    b.residual = f.bits ? nullptr : f.residual, b.bits = f.bits;
    b.dx = dx.bytes.get(), b.dresidual = w.residual ? dr.bytes.get() : nullptr;
    b.dweight = dweight.bytes.get(), b.dbias = dbias.bytes.get();
    b.count = static_cast<double>(w.values()), b.steps = fused, b.threads = threads, b.stream = stream;
    backward(w, b);

    if (size_of(w.type) == 2 || size_of(w.weight_type) == 2) return;  // the sanitizers have seen it; parity is tested elsewhere
    const bool per_channel = (w.shape == Shape::planes || w.shape == Shape::columns) && !w.groups && w.batch;
    if (per_channel && w.activation == Activation::leaky_relu && !w.residual && w.type == w.weight_type)
        compare_with_output_saved(w, f, b);
    if (w.activation != Activation::none && w.activation != Activation::relu) return;
    std::vector<double> sum(statistics), square(statistics), count(statistics), a(statistics), c(statistics);
    for (int64_t i = 0; i < elements; ++i) sum[place(w, i).statistic] += x.get(i), ++count[place(w, i).statistic];
    for (int64_t u = 0; u < statistics; ++u) sum[u] = !w.batch ? mean.get(u) : w.center ? sum[u] / count[u] : 0;
    for (int64_t i = 0; i < elements; ++i) {
        const int64_t u = place(w, i).statistic;
        square[u] += (x.get(i) - sum[u]) * (x.get(i) - sum[u]);
    }
    for (int64_t u = 0; u < statistics; ++u)
        square[u] = w.batch ? 1 / std::sqrt(square[u] / count[u] + f.eps) : rstd.get(u);
    std::vector<double> dz(elements), dw(channels), db(channels);
    for (int64_t i = 0; i < elements; ++i) {
        const Place p = place(w, i);
        const double hat = (x.get(i) - sum[p.statistic]) * square[p.statistic];
        const double z = hat * weight.get(p.channel) + bias.get(p.channel) + (w.residual ? residual.get(i) : 0);
        const bool kept = w.activation == Activation::none || y.get(i) > 0;  // its own sign: near zero both are right
        expect(y.get(i), w.activation == Activation::relu && z < 0 ? 0 : z, std::fabs(z), "output", w);
        dz[i] = kept ? dy.get(i) : 0;
        dw[p.channel] += dz[i] * hat, db[p.channel] += dz[i];
        a[p.statistic] += dz[i] * weight.get(p.channel), c[p.statistic] += dz[i] * weight.get(p.channel) * hat;
    }
    for (int64_t i = 0; i < channels; ++i) {
        expect(dweight.get(i), dw[i], std::fabs(dw[i]), "gradient of weight", w);
        expect(dbias.get(i), db[i], std::fabs(db[i]), "gradient of bias", w);
    }
    for (int64_t i = 0; i < elements; ++i) {
        const Place p = place(w, i);
        const int64_t u = p.statistic;
        const double hat = (x.get(i) - sum[u]) * square[u], own = dz[i] * weight.get(p.channel);
        const double shared = w.batch ? (w.center ? a[u] / count[u] : 0) + hat * c[u] / count[u] : 0;
        expect(dx.get(i), (own - shared) * square[u], 10 * square[u], "gradient of input", w);
        if (w.residual && w.activation != Activation::none) expect(dr.get(i), dz[i], 1, "gradient of residual", w);
    }
}

// Shapes of networks, and shapes at which something has been wrong or takes a path of its own.
const Work kRecorded[] = {
    {Shape::planes, {}, {}, {}, 0.1, {}, true, true, 2, 64, 49, 0},      // the last stage of a ResNet
    {Shape::planes, {}, {}, {}, 0.1, {}, true, true, 3, 10, 49, 0},      // several channels at once
    {Shape::planes, {}, {}, {}, 0.1, {}, true, true, 4, 1, 45, 0},       // one statistic for all threads
    {Shape::planes, {}, {}, {}, 0.1, {}, true, true, 2, 2, 45 * 47, 0},  // longer than a stretch
    {Shape::planes, {}, {}, {}, 0.1, {}, true, true, 2, 64, 64, 32},     // a diffusion U-Net
    {Shape::planes, {}, {}, {}, 0.1, {}, true, true, 1, 32, 27, 32},     // instance norm in three dimensions
    {Shape::columns, {}, {}, {}, 0.1, {}, true, true, 2, 270, 3, 0},     // wide
    {Shape::columns, {}, {}, {}, 0.1, {}, true, true, 3, 6, 187, 0},     // narrow, rows left over
    {Shape::columns, {}, {}, {}, 0.1, {}, true, true, 1, 70, 61 * 67, 0},  // longer than a period
    {Shape::columns, {}, {}, {}, 0.1, {}, true, true, 60, 100, 1, 0},    // the features of a small network
    {Shape::columns, {}, {}, {}, 0.1, {}, true, true, 2, 64, 49, 32},    // group norm, channels-last
    {Shape::rows, {}, {}, {}, 0.1, {}, true, true, 394, 48, 1, 1},       // a transformer
    {Shape::rows, {}, {}, {}, 0.1, {}, false, true, 3, 4099, 1, 1},      // RMS norm, rows beyond two stretches
    {Shape::rows, {}, {}, {}, 0.1, {}, true, true, 66, 2, 1, 3},         // group norm without space
    {Shape::tiles, {}, {}, {}, 0.1, {}, true, true, 2, 96, 49, 0},       // a ConvNeXt
};

// As many values as only some paths see: gradients kept for a block of channels, and too many of them.
const Work kLarge[] = {
    {Shape::columns, {}, {}, Activation::silu, 0.1, {}, true, true, 1, 512, 33 * 32, 2},
    {Shape::columns, {}, {}, Activation::silu, 0.1, {}, true, true, 1, 6, 150 * 151, 3},
    {Shape::planes, {}, {}, Activation::silu, 0.1, {}, true, true, 1, 3, 420 * 421, 1},
};

// The gates of an LSTM: forwards against the formula, backwards against its derivative.
void run_lstm(Type type, int64_t n, int64_t h, int threads) {
    Buffer driven(type, 4 * n * h), recurrent(type, 4 * n * h), before(type, n * h), gates(type, 3 * n * h);
    Buffer output(type, n * h), cell(type, n * h), dcell(type, n * h), doutput(type, n * h);
    Buffer dsum(type, 4 * n * h), dbefore(type, n * h);
    for (Buffer* buffer : {&driven, &recurrent, &before, &dcell, &doutput}) buffer->fill(2, 0);
    LstmStep step{};
    step.type = type, step.n = n, step.h = h, step.threads = threads;
    step.driven = driven.bytes.get(), step.recurrent = recurrent.bytes.get(), step.before = before.bytes.get();
    step.gates = gates.bytes.get(), step.output = output.bytes.get(), step.cell = cell.bytes.get();
    step.dcell = dcell.bytes.get(), step.doutput = doutput.bytes.get();
    step.dsum = dsum.bytes.get(), step.dbefore = dbefore.bytes.get();
    lstm_forward(step);
    lstm_backward(step);
    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    Work told{};
    told.type = type, told.n = n, told.c = h, told.s = 1;
    for (int64_t k = 0; k < n * h; ++k) {
        const int64_t at = k / h * 4 * h + k % h;
        const auto sum = [&](int gate) { return driven.get(at + gate * h) + recurrent.get(at + gate * h); };
        const double i = sigmoid(sum(0)), f = sigmoid(sum(1)), g = std::tanh(sum(2)), o = sigmoid(sum(3));
        const double dc = dcell.get(k);
        expect(cell.get(k), f * before.get(k) + i * g, 1, "cell", told);
        expect(output.get(k), o, 1, "output gate", told);
        expect(dsum.get(at), dc * g * i * (1 - i), 1, "gradient of input gate", told);
        expect(dsum.get(at + h), dc * before.get(k) * f * (1 - f), 1, "gradient of forget gate", told);
        expect(dsum.get(at + 2 * h), dc * i * (1 - g * g), 1, "gradient of candidate", told);
        expect(dsum.get(at + 3 * h), doutput.get(k) * o * (1 - o), 1, "gradient of output gate", told);
        expect(dbefore.get(k), dc * f, 1, "gradient of the cell before", told);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 2000;
    for (Work w : kRecorded)
        for (int kind = 0; kind < 4 * 6 * 2; ++kind) {
            w.type = w.weight_type = static_cast<Type>(kind % 4);
            w.activation = static_cast<Activation>(kind / 4 % 6), w.residual = kind / 24;
            run(w, 1 + kind % 3, kind % 5 == 0);
        }
    for (Work w : kLarge)
        for (int kind = 0; kind < 6; ++kind) {
            w.type = w.weight_type = static_cast<Type>(kind % 2), w.residual = kind == 3;
            run(w, 1 + kind % 3, kind == 5);
        }
    for (int i = 0; i < cases; ++i) {
        Work w{};
        w.shape = static_cast<Shape>(pick(0, 3));
        w.type = static_cast<Type>(pick(0, 3));
        w.weight_type = pick(0, 1) || w.type == Type::f64 ? w.type : Type::f32;
        w.activation = static_cast<Activation>(pick(0, 5));
        w.slope = 0.1, w.residual = pick(0, 1), w.batch = true, w.center = true;
        const bool large = pick(0, 15) == 0;
        w.n = pick(1, 6), w.c = pick(1, 40), w.s = pick(2, large ? 3000 : 60);
        switch (w.shape) {
            case Shape::rows:
                w.s = 1, w.c = pick(2, large ? 5000 : 90), w.groups = pick(1, 3), w.n *= w.groups;
                w.center = pick(0, 1);
                break;
            case Shape::tiles: w.c = pick(2, 40), w.center = pick(0, 1); break;
            default:
                w.batch = pick(0, 3) != 0;
                if (w.batch && pick(0, 1)) w.groups = pick(1, 4), w.c = w.groups * pick(1, 8);
        }
        run(w, static_cast<int>(pick(1, 3)), pick(0, 1));
    }
    for (int i = 0; i < cases / 10; ++i)
        run_lstm(i % 2 ? Type::f32 : Type::f64, pick(1, 20), pick(1, 70), static_cast<int>(pick(1, 3)));
    std::printf("%d random cases, %zu recorded ones: no complaint\n", cases, std::size(kRecorded) + std::size(kLarge));
    return 0;
}
