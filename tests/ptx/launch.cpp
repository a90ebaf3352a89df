// The library's entry points: launches, which tests/simt/translated.h sends here, and names of memory for the counters.
// FASTBN_PTX_COUNTERS names a file that gets one line of JSON for each launch of an entry translated with --counted.
#include "launch.h"

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "translated.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace ptx {

namespace {

std::map<std::string, const Entry*>& entries() {
  static std::map<std::string, const Entry*> all;
  return all;
}

// The symbol of a function, local ones included, which dladdr does not know: from the symbol table of its file.
const std::string& symbol_of(const void* function) {
  static std::map<const void*, std::string> known;
  if (const auto found = known.find(function); found != known.end()) return found->second;
  Dl_info info{};
  if (dladdr(function, &info) == 0) simt::fail("a kernel that is in no file");
  const int fd = open(info.dli_fname, O_RDONLY);
  struct stat status{};
  if (fd < 0 || fstat(fd, &status) != 0) simt::fail(std::string("cannot read ") + info.dli_fname);
  void* const mapped = mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (mapped == MAP_FAILED) simt::fail(std::string("cannot read ") + info.dli_fname);
  const char* file = static_cast<const char*>(mapped);
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file + header->e_shoff);
  const uint64_t base = header->e_type == ET_EXEC ? 0 : reinterpret_cast<uint64_t>(info.dli_fbase);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file + sections[i].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); ++k) {
      if (ELF64_ST_TYPE(symbols[k].st_info) != STT_FUNC) continue;
      known[reinterpret_cast<const void*>(base + symbols[k].st_value)] = names + symbols[k].st_name;
    }
  }
  munmap(mapped, size_t(status.st_size));
  return known[function];
}

// The arguments as the parameters of the entry. g++ and nvcc must agree on their sizes and alignments.
size_t lay_out(const Entry& entry, const std::vector<simt::Argument>& arguments, unsigned char (&params)[4096]) {
  if (arguments.size() != entry.params.size()) simt::fail("the entry has another number of parameters");
  size_t at = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& [data, bytes, alignment] = arguments[i];
    if (bytes != entry.params[i].bytes || alignment != entry.params[i].alignment) {
      simt::fail("parameter " + std::to_string(i) + " has " + std::to_string(bytes) + " bytes, in PTX " +
                 std::to_string(entry.params[i].bytes));
    }
    at = (at + alignment - 1) / alignment * alignment;
    if (at + bytes > sizeof params) simt::fail("more than 4096 bytes of parameters");
    std::memcpy(params + at, data, bytes);
    at += bytes;
  }
  return at;
}

FILE* counters_file() {
  static FILE* const file = [] {
    const char* path = std::getenv("FASTBN_PTX_COUNTERS");
    FILE* const opened = path == nullptr ? nullptr : std::fopen(path, "w");
    if (path != nullptr && opened == nullptr) simt::fail(std::string("cannot write ") + path);
    return opened;
  }();
  return file;
}

void launch(const simt::TranslatedLaunch& how) {
  const std::string& name = symbol_of(how.kernel);
  if (name.empty()) simt::fail("a kernel without a symbol: was the program stripped?");
  const auto found = entries().find(name);
  if (found == entries().end()) simt::fail("no PTX was translated for kernel " + name);
  alignas(64) unsigned char params[4096];
  const size_t bytes = lay_out(*found->second, *how.arguments, params);
  Launch launch{*found->second, params, bytes, MemoryOrder(unsigned(how.blocks))};
  std::unique_ptr<Counting> counting;
  if (counters_file() != nullptr && launch.entry.counted()) counting = std::make_unique<Counting>(launch.entry);
  launch.counting = counting.get();
  const auto call = [](void* p) {
    Launch& of = *static_cast<Launch*>(p);
    Thread thread(of);
    of.entry.code(thread, of.params);
    thread.exits();
  };
  simt::run(how.blocks, how.threads, how.dynamic_bytes, how.cooperative, how.cluster, call, &launch);
  ++simt::stats.translated;
  if (counting == nullptr) return;
  counting->finish_phases();
  counting->print(counters_file());
  std::fflush(counters_file());
}

}  // namespace

Entry::Entry(const char* name, void (*code)(Thread&, const unsigned char*), std::vector<Extent> params,
             std::vector<Extent> statics, const Block* blocks, int block_count, const Loop* loops, int loop_count,
             const Site* sites, int site_count)
    : name(name),
      code(code),
      params(params),
      statics(statics),
      blocks(blocks),
      block_count(block_count),
      loops(loops),
      loop_count(loop_count),
      sites(sites),
      site_count(site_count) {
  entries()[name] = this;
}

}  // namespace ptx

EXPORTED const char* ptx_launch(const simt::TranslatedLaunch& how) {
  static std::mutex one_at_a_time;
  static std::string failure;
  std::lock_guard lock(one_at_a_time);
  simt::config = *how.config, simt::stats = *how.stats, simt::watches = *how.watches;
  const char* result = nullptr;
  try {
    ptx::launch(how);
  } catch (const std::exception& e) {
    failure = e.what();
    result = failure.c_str();
  }
  *how.stats = simt::stats;
  simt::watches.clear();
  return result;
}

// Null data: forgets all names.
EXPORTED void ptx_name_tensor(const char* name, const void* data, size_t bytes) {
  if (data == nullptr) {
    ptx::regions.clear();
  } else {
    ptx::regions.push_back({name, reinterpret_cast<uint64_t>(data), bytes});
  }
}
