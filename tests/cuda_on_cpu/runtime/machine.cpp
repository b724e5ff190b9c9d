// The running thread's view of the machine, for translated kernels (declared in ptx.h).
#include "machine.h"

namespace sim {

const Dim3& thread_index() { return machine.thread_index(); }
const Dim3& block_index() { return machine.block_index(); }
const Dim3& block_size() { return machine.block_size(); }
const Dim3& grid_size() { return machine.grid_size(); }
uint32_t lane() { return machine.lane(); }
uint64_t dynamic_shared_address() { return machine.dynamic_shared_address(); }

const char* parameter(uint64_t offset, uint64_t bytes) { return machine.parameter(offset, bytes); }
char* global_memory(uint64_t address, uint64_t bytes, Mode mode) { return machine.global(address, bytes, mode); }
char* shared_memory(uint64_t address, uint64_t bytes, Mode mode) { return machine.shared(address, bytes, mode); }

void block_barrier(const char* site) { machine.block_barrier(site); }
void warp_barrier(uint32_t mask, const char* site) { machine.warp_barrier(mask, site); }

void fail(const char* complaint) { throw Error(complaint); }

ShuffleResult shuffle(Shuffle mode, uint32_t value, uint32_t by, uint32_t clamp_and_segment, uint32_t mask,
                             const char* site) {
  const uint32_t clamp = clamp_and_segment & 31, segment = clamp_and_segment >> 8 & 31;
  const auto source_of = [=](int lane, int shift) {
    const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
    switch (mode) {
      case Shuffle::up: return lane - shift >= highest ? lane - shift : -1;
      case Shuffle::down: return lane + shift <= highest ? lane + shift : -1;
      case Shuffle::butterfly: return (lane ^ shift) <= highest ? lane ^ shift : -1;
      default: {
        const int source = lowest | (shift & ~segment);
        return source <= highest ? source : -1;
      }
    }
  };
  const Payload result = machine.collective(mask, site, {value, by & 31}, [&](auto& lanes, uint32_t members) {
    const auto brought = lanes;
    for (int lane = 0; lane < int(kWarpSize); ++lane) {
      const int source = source_of(lane, brought[lane][1]);
      const bool member = source < 0 || (members >> source & 1);
      lanes[lane] = {member ? brought[source < 0 ? lane : source][0] : 0xffffffffu, source >= 0};
    }
  });
  return {result[0], result[1] != 0};
}

uint32_t ballot(bool predicate, uint32_t mask, const char* site) {
  return machine.collective(mask, site, {predicate}, [](auto& lanes, uint32_t members) {
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) votes |= (members >> lane & lanes[lane][0]) << lane;
    lanes.fill({votes});
  })[0];
}

}  // namespace sim
