// In: memory that processes of one machine, the ranks, have in common. Out: what each tells of its part of a batch,
// channel by channel, as soon as it knows it.
#pragma once

#include <cstdint>

namespace fastbn::cpu {

// One rank's end of the memory.
class Exchange {
 public:
  static int64_t bytes(int64_t ranks, int64_t channels);

  // file: one of as many bytes, zeros before the first rank came, that all have opened; closed with this. It must be
  // the only descriptor that this process has for it, because a lock on it says that this rank is alive. channels: the
  // most there may be in a turn, at most 1 << 19. Raises std::runtime_error, and then leaves the file open.
  Exchange(int file, int64_t rank, int64_t ranks, int64_t channels, double timeout_seconds);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  int64_t ranks() const;
  int64_t channels() const;
  int64_t turns() const;  // that have begun

 private:
  friend class Turn;
  struct Memory;
  Memory* const memory_;
};

// What is told, which must be the same in all ranks.
enum class Topic : uint8_t { moments, gradients, values };

// One exchange. All ranks make the same ones in the same order, and in each tell and hear of every channel. What does
// not come within the timeout, or from a rank that has ended, is a std::runtime_error here and in every rank that
// waits; so is what another rank tells of other channels. After one the memory is of no more use, which each turn says.
class Turn {
 public:
  static constexpr int64_t most_values = 3;

  // Waits for another thread's turn.
  Turn(Exchange& exchange, Topic topic, int64_t channels);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  int64_t ranks() const;

  // By any thread, as is heard.
  void tell(int64_t channel, double a, double b, double c);

  // Before others are heard of these channels: what they told is in another processor's cache.
  void fetch(int64_t first, int64_t channels) const;

  // Whether all ranks have told of a channel, and so of those that they told of before.
  bool told(int64_t channel) const;

  // The values that a rank told of a channel, which stay until the turn ends; waits for them.
  const double* heard(int64_t rank, int64_t channel);

  // All was heard. Without it the other ranks are told that this one has failed.
  void end();

 private:
  Exchange::Memory& memory_;
  bool ended_ = false;
};

}  // namespace fastbn::cpu
