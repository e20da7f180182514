// Where results are written. Large outputs go past the caches (non-temporal stores): the write then does not read the
// line first and does not evict what the next layer wants. Such stores pay only in whole aligned lines, which a run of
// 7 x 7 = 49 elements never fills; so results gather in a buffer that stays in the first-level cache and leave it a few
// kilobytes at a time, and no inner loop knows about any of this.
#pragma once

#include "lanes.h"

namespace normkit::NORMKIT_ISA {

template <class T> class Output {
  public:
    explicit Output(bool stream) : stream_(stream) {}
    ~Output() { flush(); }
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;

    // Room for n elements (at most kRoom) that belong at `to`; null stays null.
    T* room(T* to, int64_t n) {
        if (!stream_ || !to) return to;
        if (to != begin_ + filled_ || filled_ + n > kRoom) {
            flush();
            begin_ = to;
        }
        T* out = buffer_ + filled_;
        filled_ += n;
        return out;
    }

    static constexpr int64_t kRoom = sizeof(T) == 8 ? 2048 : 8192 / sizeof(T);

  private:
    void flush() {
        if (!filled_) return;
        char* to = reinterpret_cast<char*>(begin_);
        const char* from = reinterpret_cast<const char*>(buffer_);
        size_t left = static_cast<size_t>(filled_) * sizeof(T);
        filled_ = 0;
#if defined(__AVX512F__) || defined(__AVX__)
        size_t head = (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64;
        head = head < left ? head : left;
        std::memcpy(to, from, head);
        to += head, from += head, left -= head;
        for (; left >= 64; to += 64, from += 64, left -= 64) {
#if defined(__AVX512F__)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1,
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + 1));
#endif
        }
#endif
        std::memcpy(to, from, left);
    }

    bool stream_;
    T* begin_ = nullptr;
    int64_t filled_ = 0;
    alignas(64) T buffer_[kRoom];
};

// Makes streamed stores visible to other threads; every thread calls it before it leaves.
inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace normkit::NORMKIT_ISA
