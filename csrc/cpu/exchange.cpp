// In: calls through exchange.h. Out: loads and stores of mapped memory, and locks of a file.
#include "exchange.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

namespace fastbn::cpu {

namespace {

using Clock = std::chrono::steady_clock;

// Half a line: what is told of a channel goes from core to core at once.
struct alignas(32) Entry {
  double values[Turn::most_values];
  std::atomic<uint64_t> turn;  // that they are of, written after them
};

struct alignas(64) Header {
  std::atomic<uint64_t> subject[2];  // of the last even turn, and the last odd one
  std::atomic<bool> failed;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

constexpr int64_t subject_bits = 24;  // of them four are the topic
constexpr const char* topics[] = {"moments", "gradients", "values"};

uint64_t subject_of(uint64_t turn, Topic topic, int64_t channels) {
  return turn << subject_bits | uint64_t(channels) << 4 | uint64_t(topic);
}

std::string in_words(uint64_t subject) {
  const uint64_t channels = (subject & ((1 << subject_bits) - 1)) >> 4;
  return std::string(topics[subject & 15]) + " of " + std::to_string(channels) + " channels";
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// How many forks this process is away from the first one of its line. An exchange is of one process: a child has the
// same memory, but not the locks, and the thread that may have been in a turn is not there.
std::atomic<int64_t> forks{0};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { ++forks; });

struct flock lock_of(short type, int64_t rank) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = off_t(rank);
  lock.l_len = 1;
  return lock;
}

}  // namespace

struct Exchange::Memory {
  int file;
  int64_t rank, ranks, channels;
  double timeout;
  int64_t spins;  // before others are let on the processor: a tenth of a millisecond or two
  Header* headers;
  Entry* entries;
  uint64_t turn = 0, subject = 0;
  std::mutex mutex;
  int64_t of_process = forks;

  // Two of each: who has begun a turn has ended the one before, so nobody looks at what is two turns old.
  Entry& entry(int64_t of_rank, int64_t channel) const {
    return entries[(int64_t(turn & 1) * ranks + of_rank) * channels + channel];
  }

  [[noreturn]] void fail(const std::string& why) {
    headers[rank].failed.store(true, std::memory_order_release);
    throw std::runtime_error("SyncBatchNorm: " + why);
  }

  // A process that ends, however it does, gives its locks back.
  bool alive(int64_t of_rank) const {
    struct flock lock = lock_of(F_WRLCK, of_rank);
    return fcntl(file, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
  }

  void check_subject(int64_t of_rank) {
    const uint64_t other = headers[of_rank].subject[turn & 1].load(std::memory_order_acquire);
    if (other >> subject_bits == turn && other != subject) {
      fail("rank " + std::to_string(of_rank) + " of the process group exchanges " + in_words(other) +
           ", and this one, " + std::to_string(rank) + ", " + in_words(subject));
    }
  }

  void check_failures() {
    for (int64_t k = 0; k < ranks; ++k) {
      if (headers[k].failed.load(std::memory_order_acquire)) {
        fail("rank " + std::to_string(k) + " of the process group has given up an exchange");
      }
    }
  }

  void wait(const Entry& entry, int64_t of_rank) {
    const auto came = [&] { return entry.turn.load(std::memory_order_acquire) == turn; };
    for (int64_t i = 0; i < spins; ++i) {
      if (came()) return;
      pause();
    }
    const auto begun = Clock::now();
    const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - begun).count(); };
    // Most wait for microseconds; where it takes longer nobody minds a tenth of a millisecond.
    constexpr double short_time = 1e-3, between_checks = 1e-2;
    const std::string other = "rank " + std::to_string(of_rank) + " of the process group";
    for (double next_check = between_checks; !came();) {
      const double waited = seconds();
      if (waited < short_time) {
        sched_yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
      if (waited < next_check) continue;
      next_check = waited + between_checks;
      check_subject(of_rank);
      check_failures();
      if (!alive(of_rank) && !came()) fail(other + " has ended");
      if (waited > timeout) fail(other + " did not come within " + std::to_string(int64_t(timeout)) + " s");
    }
  }
};

int64_t Exchange::bytes(int64_t ranks, int64_t channels) {
  return ranks * int64_t(sizeof(Header)) + 2 * ranks * channels * int64_t(sizeof(Entry));
}

Exchange::Exchange(int file, int64_t rank, int64_t ranks, int64_t channels, double timeout_seconds)
    : memory_(new Memory{file, rank, ranks, channels, timeout_seconds, 0, nullptr, nullptr}) {
  const auto give_up = [&](const char* what) {
    const int error = errno;
    delete memory_;
    throw std::runtime_error(std::string("fastbn: cannot ") + what + " shared memory: " + std::strerror(error));
  };
  struct stat status;
  if (fstat(file, &status) != 0) give_up("look at");
  if (status.st_size < bytes(ranks, channels)) errno = ENOSPC, give_up("fill");
  struct flock lock = lock_of(F_WRLCK, rank);
  if (fcntl(file, F_SETLK, &lock) != 0) give_up("lock");
  void* const data = mmap(nullptr, size_t(bytes(ranks, channels)), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (data == MAP_FAILED) give_up("map");
  // Where there are more ranks than processors, one of them waits for this one's.
  const bool alone = int64_t(std::thread::hardware_concurrency()) >= ranks;
  memory_->spins = alone ? 10000 : 0;
  memory_->headers = static_cast<Header*>(data);
  memory_->entries = reinterpret_cast<Entry*>(memory_->headers + ranks);
}

Exchange::~Exchange() {
  munmap(memory_->headers, size_t(bytes(memory_->ranks, memory_->channels)));
  close(memory_->file);
  delete memory_;
}

int64_t Exchange::ranks() const { return memory_->ranks; }
int64_t Exchange::channels() const { return memory_->channels; }
int64_t Exchange::turns() const { return int64_t(memory_->turn); }

Turn::Turn(Exchange& exchange, Topic topic, int64_t channels) : memory_(*exchange.memory_) {
  if (memory_.of_process != forks.load(std::memory_order_relaxed)) {
    throw std::runtime_error(
        "SyncBatchNorm: this process was forked after its process group had been used, and cannot use that; make a new "
        "one here");
  }
  memory_.mutex.lock();
  Header& own = memory_.headers[memory_.rank];
  const bool failed = own.failed.load(std::memory_order_relaxed);
  if (failed || channels < 1 || channels > memory_.channels) {
    memory_.mutex.unlock();
    throw std::runtime_error(failed ? "SyncBatchNorm: an exchange of this process group has failed before"
                                    : "SyncBatchNorm: there should be 1 to " + std::to_string(memory_.channels) +
                                          " channels, not " + std::to_string(channels));
  }
  ++memory_.turn;
  memory_.subject = subject_of(memory_.turn, topic, channels);
  own.subject[memory_.turn & 1].store(memory_.subject, std::memory_order_release);
}

Turn::~Turn() {
  if (!ended_) memory_.headers[memory_.rank].failed.store(true, std::memory_order_release);
  memory_.mutex.unlock();
}

int64_t Turn::ranks() const { return memory_.ranks; }

void Turn::tell(int64_t channel, double a, double b, double c) {
  Entry& entry = memory_.entry(memory_.rank, channel);
  entry.values[0] = a, entry.values[1] = b, entry.values[2] = c;
  entry.turn.store(memory_.turn, std::memory_order_release);
}

void Turn::fetch(int64_t first, int64_t channels) const {
  constexpr int64_t a_line = 64 / int64_t(sizeof(Entry));
  for (int64_t k = 0; k < memory_.ranks; ++k) {
    if (k == memory_.rank) continue;
    for (int64_t c = 0; c < channels; c += a_line) __builtin_prefetch(&memory_.entry(k, first + c));
  }
}

bool Turn::told(int64_t channel) const {
  for (int64_t k = 0; k < memory_.ranks; ++k) {
    if (memory_.entry(k, channel).turn.load(std::memory_order_acquire) != memory_.turn) return false;
  }
  return true;
}

const double* Turn::heard(int64_t rank, int64_t channel) {
  const Entry& entry = memory_.entry(rank, channel);
  if (entry.turn.load(std::memory_order_acquire) != memory_.turn) memory_.wait(entry, rank);
  return entry.values;
}

void Turn::end() {
  for (int64_t k = 0; k < memory_.ranks; ++k) memory_.check_subject(k);
  memory_.check_failures();  // of ranks that had told all before they gave up
  ended_ = true;
}

}  // namespace fastbn::cpu
