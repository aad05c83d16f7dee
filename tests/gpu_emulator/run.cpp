// Runs one kernel over its whole grid: 32 threads are the lanes of one simdgroup after
// the other, and wait for each other wherever the kernel exchanges values.
//
// Arguments: cuda (0 or 1), grid (3), thread group (3), number of inputs, the files of
// the inputs, then pairs of an output's bytes and file. Every buffer is an allocation
// of its own, so that an address sanitiser finds what reads or writes beyond it.

#include "gpu.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// The kernel, with its buffers as MLX would hand them over.
void kernel(char* const* buffers, uint3 position_in_grid);

thread_local unsigned lane_of_thread;
thread_local uint3 blockIdx, blockDim, threadIdx;

float16::operator float() const {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction ? NAN : sign * INFINITY;
  }
  const int whole = exponent ? 1024 + fraction : fraction;
  return sign * std::ldexp(float(whole), std::max(exponent, 1) - 25);
}

float16::float16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) {
    bits = 0x7e00;
  } else if (size >= 65520.0f) {
    bits = sign | 0x7c00;
  } else {
    int exponent;
    std::frexp(size, &exponent);
    exponent = std::max(exponent, -13);
    // nearbyint rounds to nearest, ties to even; a carry goes into the exponent.
    const int whole = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
    bits = sign | uint16_t(whole < 1024 ? whole : (exponent + 13) * 1024 + whole);
  }
}

namespace {

std::mutex mutex;
std::condition_variable changed;
float exchanged[2][32];  // by turns: a lane may be one exchange ahead of another
int active, waiting, ended;
long exchanges, simdgroups;
bool some_ended, parted;

// At the end of a simdgroup, also for lanes that had no thread in it.
void end_simdgroup(bool had_thread, int next_active) {
  std::unique_lock lock(mutex);
  if (had_thread) {
    some_ended = true;
    if (waiting > 0) {
      parted = true;
      changed.notify_all();
    }
  }
  const long mine = simdgroups;
  if (++ended < 32) {
    changed.wait(lock, [&] { return simdgroups != mine; });
    return;
  }
  ended = waiting = 0;
  some_ended = false;
  active = next_active;
  ++simdgroups;
  changed.notify_all();
}

struct Place {
  uint3 group, size;  // of a thread group, where and how large it is
  unsigned first;     // its first thread in this simdgroup
};

void run_lane(unsigned lane, const std::vector<Place>& places, uint3 threadgroup,
              char* const* buffers) {
  lane_of_thread = lane;
  for (size_t i = 0; i < places.size(); ++i) {
    const Place& place = places[i];
    const unsigned index = place.first + lane;
    const unsigned threads = place.size.x * place.size.y * place.size.z;
    if (index < threads) {
      blockIdx = place.group;
      blockDim = threadgroup;
      threadIdx = {index % place.size.x, index / place.size.x % place.size.y,
                   index / (place.size.x * place.size.y)};
      kernel(buffers, {blockIdx.x * blockDim.x + threadIdx.x,
                       blockIdx.y * blockDim.y + threadIdx.y,
                       blockIdx.z * blockDim.z + threadIdx.z});
    }
    int next = 0;
    if (i + 1 < places.size()) {
      const uint3 s = places[i + 1].size;
      next = int(std::min(32u, s.x * s.y * s.z - places[i + 1].first));
    }
    end_simdgroup(index < threads, next);
  }
}

}  // namespace

void exchange(float value, float (&values)[32]) {
  std::unique_lock lock(mutex);
  const long mine = exchanges;
  float* all = exchanged[mine % 2];
  all[lane_of_thread] = value;
  if (some_ended) {
    parted = true;
    changed.notify_all();
  } else if (++waiting == active) {
    waiting = 0;
    ++exchanges;
    changed.notify_all();
  } else {
    changed.wait(lock, [&] { return exchanges != mine || parted; });
  }
  std::copy(all, all + 32, values);
}

int main(int count, char** arguments) {
  int at = 1;
  const auto number = [&] { return unsigned(std::atoi(arguments[at++])); };
  const bool cuda = number();
  const uint3 grid = {number(), number(), number()};
  uint3 group = {number(), number(), number()};
  group = {std::min(group.x, grid.x), std::min(group.y, grid.y),
           std::min(group.z, grid.z)};

  std::vector<char*> buffers;
  for (unsigned inputs = number(); inputs > 0; --inputs) {
    std::ifstream file(arguments[at++], std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(file), {});
    buffers.push_back(new char[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), buffers.back());
  }
  std::vector<std::pair<size_t, std::string>> outputs;
  while (at < count) {
    const size_t bytes = number();
    outputs.emplace_back(bytes, arguments[at++]);
    buffers.push_back(new char[bytes]);
    std::fill_n(buffers.back(), bytes, char(0xff));  // NaN, until it is written
  }

  std::vector<Place> places;
  for (unsigned z = 0; z * group.z < grid.z; ++z) {
    for (unsigned y = 0; y * group.y < grid.y; ++y) {
      for (unsigned x = 0; x * group.x < grid.x; ++x) {
        // Metal cuts the last thread groups off at the grid's end, CUDA does not.
        const uint3 size = cuda ? group
                                : uint3{std::min(group.x, grid.x - x * group.x),
                                        std::min(group.y, grid.y - y * group.y),
                                        std::min(group.z, grid.z - z * group.z)};
        for (unsigned first = 0; first < size.x * size.y * size.z; first += 32) {
          places.push_back({{x, y, z}, size, first});
        }
      }
    }
  }
  const uint3 s = places[0].size;
  active = int(std::min(32u, s.x * s.y * s.z));
  std::vector<std::thread> lanes;
  for (unsigned lane = 0; lane < 32; ++lane) {
    lanes.emplace_back(run_lane, lane, std::cref(places), group, buffers.data());
  }
  for (std::thread& lane : lanes) {
    lane.join();
  }
  const size_t inputs = buffers.size() - outputs.size();
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::ofstream(outputs[i].second, std::ios::binary)
        .write(buffers[inputs + i], outputs[i].first);
  }
  for (char* buffer : buffers) {
    delete[] buffer;
  }
  if (parted) {
    std::fputs("Some lanes ended while others waited for them.\n", stderr);
    return 1;
  }
}
