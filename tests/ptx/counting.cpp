#include "counting.h"

#include <cxxabi.h>

#include <bit>
#include <set>

namespace ptx {

Counting::Counting(const Entry& entry) {
  counts.entry = &entry;
  counts.executions.assign(size_t(entry.block_count), 0), counts.lanes = counts.executions;
  counts.sites.resize(size_t(entry.site_count));
}

namespace {

void count_global(Accesses& to, const Site& site, const WarpCounts::Access& access) {
  std::map<uint64_t, uint64_t> sectors;  // -> an address of the lane that asked for it
  std::set<uint64_t> words;
  for (unsigned m = access.mask; m != 0; m &= m - 1) {
    const uint64_t a = access.address[std::countr_zero(m)];
    for (uint64_t s = a / 32; s <= (a + site.bytes - 1) / 32; ++s) sectors[s] = std::max(a, s * 32);
    words.insert(a / site.bytes);
  }
  to.sectors += sectors.size();
  to.least_sectors += (words.size() * site.bytes + 31) / 32;
  for (const auto& [sector, a] : sectors) ++to.sectors_of[region_of(a)];
}

// 128 bytes a cycle: all 32 lanes at once where each has 4 bytes, half of them for 8 bytes, a quarter for 16. In each
// of these parts a bank serves one word of 4 bytes in a cycle.
void count_shared(Accesses& to, const Site& site, const WarpCounts::Access& access) {
  const unsigned together = site.bytes <= 4 ? 32 : 128 / site.bytes;
  for (unsigned first = 0; first < 32; first += together) {
    std::array<std::set<uint64_t>, 32> words;
    for (unsigned lane = first; lane < first + together; ++lane) {
      if (!(access.mask >> lane & 1)) continue;
      for (uint64_t word = access.address[lane] / 4; word <= (access.address[lane] + site.bytes - 1) / 4; ++word) {
        words[word % 32].insert(word);
      }
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    to.cycles += most, to.least_cycles += most != 0;
  }
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string out = status == 0 ? text : name;
  std::free(text);
  for (const char* drop : {"fastbn::cuda::", "(anonymous namespace)::", "fastbn::", "void "}) {
    for (size_t at; (at = out.find(drop)) != std::string::npos;) out.erase(at, std::strlen(drop));
  }
  return out.substr(0, out.find('('));
}

using Number = unsigned long long;

}  // namespace

void Counting::finish(WarpCounts& warp) {
  ++counts.warps;
  for (const auto& [key, executed] : warp.blocks) {
    ++counts.executions[size_t(executed.first)];
    counts.lanes[size_t(executed.first)] += unsigned(std::popcount(executed.second));
  }
  for (const auto& [key, access] : warp.accesses) {
    const Site& site = counts.entry->sites[access.site];
    Accesses& to = counts.sites[size_t(access.site)];
    ++to.requests, to.lanes += unsigned(std::popcount(access.mask));
    site.space == Space::global ? count_global(to, site, access) : count_shared(to, site, access);
  }
  warp.blocks.clear(), warp.accesses.clear();
}

void Counting::finish_phases() {
  const unsigned warps_a_block = (simt::machine.threads + 31) / 32;
  for (unsigned block = 0; block < simt::machine.blocks; ++block) {
    const auto& sites = barrier_sites[block];
    for (size_t phase = 0; phase <= sites.size(); ++phase) {
      Phases& of = counts.phases[phase < sites.size() ? sites[phase] : -1];
      uint64_t longest = 0;
      for (unsigned w = 0; w < warps_a_block; ++w) {
        const auto& phases = warps[block * warps_a_block + w].phases;
        if (phase >= phases.size()) continue;
        longest = std::max(longest, phases[phase]), of.all += phases[phase];
      }
      ++of.count, of.longest += longest;
    }
  }
}

void Counting::print(FILE* to) const {
  const Counts& c = counts;
  const Entry& e = *c.entry;
  std::fprintf(to, "{\"kernel\": \"%s\", \"blocks\": %llu, \"threads\": %llu, \"warps\": %llu, ",
               demangled(e.name).c_str(), Number(c.blocks), Number(c.threads), Number(c.warps));
  std::fprintf(to,
               "\"block_barriers\": %llu, \"group_barriers\": %llu, \"round_trips\": %u, \"tile_round_trips\": %u, ",
               Number(c.block_barriers), Number(c.group_barriers), c.round_trips, c.tile_round_trips);
  const char* comma = "";
  const auto print_classes = [&](auto&& take) {
    std::array<uint64_t, classes> sums{};
    for (int b = 0; b < e.block_count; ++b) {
      for (int k = 0; k < classes && take(b); ++k) sums[size_t(k)] += c.executions[size_t(b)] * e.blocks[b].counts[k];
    }
    std::fprintf(to, "{");
    for (int k = 0; k < classes; ++k) {
      std::fprintf(to, "%s\"%s\": %llu", k == 0 ? "" : ", ", class_names[k], Number(sums[size_t(k)]));
    }
    std::fprintf(to, "}");
  };
  std::fprintf(to, "\"instructions\": "), print_classes([](int) { return true; });

  // Requests of 16 bytes a lane in a loop, which tell the loops over vectors of the tensor from others.
  const auto vectors_of = [&](int loop) {
    uint64_t sum = 0;
    for (int s = 0; s < e.site_count; ++s) {
      const auto& loops = e.blocks[e.sites[s].block].loops;
      if (e.sites[s].bytes == 16 && !loops.empty() && loops.back() == loop) sum += c.sites[size_t(s)].requests;
    }
    return sum;
  };
  std::fprintf(to, ", \"loops\": [");
  for (int l = 0; l < e.loop_count; ++l) {
    const auto within = [&](int b) {
      const auto& loops = e.blocks[b].loops;
      return std::find(loops.begin(), loops.end(), l) != loops.end();
    };
    bool innermost = true;
    for (int b = 0; b < e.block_count; ++b) innermost = innermost && (!within(b) || e.blocks[b].loops.back() == l);
    const size_t header = size_t(e.loops[l].header);
    if (!innermost || c.executions[header] == 0) continue;
    std::fprintf(
        to, "%s{\"source\": \"%s\", \"turns\": %llu, \"lanes\": %llu, \"vectors\": %llu, \"instructions\": ", comma,
        e.blocks[header].source, Number(c.executions[header]), Number(c.lanes[header]), Number(vectors_of(l)));
    print_classes(within);
    std::fprintf(to, "}"), comma = ", ";
  }
  comma = "";
  std::fprintf(to, "], \"phases\": [");
  for (const auto& [site, of] : c.phases) {
    std::fprintf(to, "%s{\"until\": \"%s\", \"count\": %llu, \"longest\": %llu, \"all\": %llu}", comma,
                 site < 0 ? "the end" : e.sites[site].source, Number(of.count), Number(of.longest), Number(of.all));
    comma = ", ";
  }
  comma = "";
  std::fprintf(to, "], \"sites\": [");
  for (int s = 0; s < e.site_count; ++s) {
    const Accesses& of = c.sites[size_t(s)];
    const Site& site = e.sites[s];
    const auto& loops = e.blocks[site.block].loops;
    if (of.requests == 0) continue;
    std::fprintf(
        to,
        "%s{\"name\": \"%s\", \"source\": \"%s\", \"space\": \"%s\", \"bytes\": %u, "
        "\"in_vector_loop\": %s, \"requests\": %llu, "
        "\"lanes\": %llu, \"sectors\": %llu, \"least_sectors\": %llu, \"cycles\": %llu, \"least_cycles\": %llu, "
        "\"sectors_of\": {",
        comma, site.name, site.source, site.space == Space::global ? "global" : "shared", site.bytes,
        !loops.empty() && vectors_of(loops.back()) > 0 ? "true" : "false", Number(of.requests), Number(of.lanes),
        Number(of.sectors), Number(of.least_sectors), Number(of.cycles), Number(of.least_cycles));
    comma = "";
    for (const auto& [region, n] : of.sectors_of) {
      std::fprintf(to, "%s\"%s\": %llu", comma, region.c_str(), Number(n)), comma = ", ";
    }
    std::fprintf(to, "}}"), comma = ", ";
  }
  std::fprintf(to, "]}\n");
}

}  // namespace ptx
