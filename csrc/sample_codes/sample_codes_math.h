// The random stream of the sampler, in integers: Philox 4x32-10 (Salmon et al., 2011), as in
// vpfast/models/shrvqvae/random.py. A number is a function of where it is used and nothing else.
#pragma once

#include <cstdint>

namespace vpfast::sample_codes {

struct Words {
  uint32_t word[4];
};

inline Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter.word[0], second = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(second >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(second),
                static_cast<uint32_t>(first >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(first)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// In the open interval (0, 1).
inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

}  // namespace vpfast::sample_codes
