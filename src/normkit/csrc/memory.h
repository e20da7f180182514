// What the operating system and the caches are asked for.
#pragma once

#include <cstddef>

namespace normkit {

// Outputs of at least this many bytes are written past the caches; tunable, because it depends on the last-level cache.
size_t stream_above();
void set_stream_above(size_t bytes);

// Asks for huge pages behind a large fresh output before it is first touched: one page fault instead of 512.
void advise(void* memory, size_t bytes);

}  // namespace normkit
