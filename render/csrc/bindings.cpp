// The table of compiled ops. PF_MODULE is the module's name: one is built per instruction set.
#include "bindings.h"
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include "constants.h"
#include "cpu.h"
#include "parallel.h"

namespace {

// Gradients of tens of megabytes are freed and allocated again each step. By default glibc returns such blocks to the
// system, and touching fresh pages then costs more than the work (62 of 80 ms for a million primitives' harmonics).
void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

}  // namespace

NB_MODULE(PF_MODULE, m) {
  m.def("cpu_level", &pf::cpu_level);
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("set_num_threads", &pf::set_num_threads);
  m.def("num_threads", &pf::num_threads);
  m.attr("ALPHA_MIN") = pf::kAlphaMin, m.attr("ALPHA_MAX") = pf::kAlphaMax, m.attr("TRANS_MIN") = pf::kTransMin;
  m.attr("NEAR") = pf::kNear, m.attr("BLUR") = pf::kBlur, m.attr("VIEW_MARGIN") = pf::kViewMargin;
  m.attr("LOG_ALPHA_MIN") = pf::kLogAlphaMin;
  pf::bind_adam(m);
  pf::bind_bin(m);
  pf::bind_composite(m);
  pf::bind_grid(m);
  pf::bind_march(m);
  pf::bind_mlp(m);
  pf::bind_pfz_decode(m);
  pf::bind_project(m);
  pf::bind_project_convexes(m);
  pf::bind_sh(m);
  pf::bind_sort_grid(m);
  pf::bind_ssim(m);
}
