// What a sanitizer must report, for the test that it is on (tests/test_asan.py). In the build of `make test-asan` only.
#include <cstdint>
#include <memory>

#define FASTFT_EXPORT extern "C" __attribute__((visibility("default")))

// Not constants, so that no compiler foresees what happens.
FASTFT_EXPORT float fastft_reads_past_the_end(int64_t n) {
  std::unique_ptr<volatile float[]> p(new volatile float[n]());
  return p[n];
}

FASTFT_EXPORT int32_t fastft_overflows(int32_t x) { return x + 1; }
