// Mean and squared deviations, gathered in float a stretch at a time and merged in double (Chan, Golub & LeVeque 1983).
// E[x^2] - E[x]^2 is never formed around zero: each stretch is measured around a shift close to its own mean, and the
// shift follows the mean of everything seen so far, so that no order of the values can make it a bad one for long.
#pragma once

#include "leaves.h"

namespace normkit::NORMKIT_ISA {

struct Moments {
    double count = 0, mean = 0, m2 = 0;

    void merge(double other_count, double other_mean, double other_m2) {
        if (other_count == 0) return;
        const double all = count + other_count, delta = other_mean - mean;
        mean += delta * (other_count / all);
        m2 += other_m2 + delta * delta * (count * (other_count / all));
        count = all;
    }
};

constexpr int64_t kStretch = 2048;  // elements that may be summed in float before they go into double

// The moments of one statistic while its runs pass by.
template <class T> struct Gathering {
    Lanes<T> sums[2]{};
    int64_t pending = 0;
    Number<T> shift = 0;
    Moments moments;

    void add(const T* x, int64_t n) {
        for (int64_t i = 0; i < n; i += kStretch) {
            const int64_t length = n - i < kStretch ? n - i : kStretch;
            run_moments<T>(x + i, length, shift, sums);
            pending += length;
            if (pending >= kStretch) settle();
        }
    }
    void settle() {
        if (!pending) return;
        const double s = total(sums[0]), q = total(sums[1]), offset = s / static_cast<double>(pending);
        const double m2 = q - s * offset;
        moments.merge(static_cast<double>(pending), shift + offset, m2 < 0 ? 0 : m2);
        shift = static_cast<Number<T>>(moments.mean);
        sums[0] = sums[1] = Lanes<T>{};
        pending = 0;
    }
};

// Sums of dz and dz (x - mean) of one statistic while its runs pass by.
template <class T> struct Summing {
    Lanes<T> sums[2]{};
    int64_t pending = 0;
    double dz = 0, dz_x = 0;

    void settle() {
        dz += total(sums[0]);
        dz_x += total(sums[1]);
        sums[0] = sums[1] = Lanes<T>{};
        pending = 0;
    }
};

}  // namespace normkit::NORMKIT_ISA
