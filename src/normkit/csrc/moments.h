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

constexpr int64_t kKept = int64_t{1} << 19;  // gradients before an activation that a thread keeps between its two passes
constexpr int64_t kStretch = 2048;  // elements that may be summed in float before they go into double

// Merges what one statistic's sums hold after `count` values, and begins them anew around the mean so far.
template <class T> INLINE void settle(Lanes<T>* sums, double count, Number<T>& shift, Moments& moments) {
    const double s = total(sums[0]), q = total(sums[1]), offset = s / count, m2 = q - s * offset;
    moments.merge(count, shift + offset, m2 < 0 ? 0 : m2);
    shift = static_cast<Number<T>>(moments.mean);
    sums[0] = sums[1] = Lanes<T>{};
}

}  // namespace normkit::NORMKIT_ISA
