#include "parallel.h"

#include <dlfcn.h>

#include <exception>
#include <future>
#include <mutex>
#include <vector>

namespace pecker {
namespace {

// The OpenMP runtime that torch brought along, if it is GNU's. Its threads wait in a busy loop for a while after
// each of torch's operators: threads of our own would have to share the processors with them.
struct OpenMp {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  OpenMp() {
    void* loaded = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (!loaded) return;
    thread_num = reinterpret_cast<int (*)()>(dlsym(loaded, "omp_get_thread_num"));
    num_threads = reinterpret_cast<int (*)()>(dlsym(loaded, "omp_get_num_threads"));
    if (thread_num && num_threads) {
      parallel = reinterpret_cast<decltype(parallel)>(dlsym(loaded, "GOMP_parallel"));
    }
  }
};

const OpenMp& openmp() {
  static const OpenMp runtime;
  return runtime;
}

struct Team {
  const std::function<void(std::int64_t)>& share;
  std::int64_t count;
  std::mutex mutex;
  std::exception_ptr error;
};

// One thread of a team, which may have fewer threads than shares. No exception may leave it.
void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  for (std::int64_t i = openmp().thread_num(); i < team.count; i += openmp().num_threads()) {
    try {
      team.share(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(team.mutex);
      if (!team.error) team.error = std::current_exception();
    }
  }
}

}  // namespace

void run_shares(std::int64_t count, const std::function<void(std::int64_t)>& share) {
  if (openmp().parallel) {
    Team team{share, count, {}, {}};
    openmp().parallel(work, &team, static_cast<unsigned>(count), 0);
    if (team.error) std::rethrow_exception(team.error);
    return;
  }
  // Without it threads are made per call. std::async's default policy runs a share in the caller when the system
  // refuses another thread.
  std::vector<std::future<void>> helpers;
  for (std::int64_t i = 1; i < count; ++i) helpers.push_back(std::async([&share, i] { share(i); }));
  share(0);
  for (std::future<void>& helper : helpers) helper.get();
}

}  // namespace pecker
