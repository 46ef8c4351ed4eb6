// The table of compiled ops. PF_MODULE is the module's name: one is built per instruction set.
#include "bindings.h"
#include "parallel.h"

NB_MODULE(PF_MODULE, m) {
  m.def("set_num_threads", &pf::set_num_threads);
  m.def("num_threads", &pf::num_threads);
  pf::bind_bin(m);
  pf::bind_composite(m);
  pf::bind_project(m);
  pf::bind_sh(m);
}
