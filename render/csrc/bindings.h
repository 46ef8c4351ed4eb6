// Each op's file defines its own bind function; bindings.cpp calls them.
#pragma once
#include <nanobind/nanobind.h>

namespace pf {

void bind_adam(nanobind::module_ &m);
void bind_bin(nanobind::module_ &m);
void bind_composite(nanobind::module_ &m);
void bind_grid(nanobind::module_ &m);
void bind_march(nanobind::module_ &m);
void bind_mlp(nanobind::module_ &m);
void bind_pfz_decode(nanobind::module_ &m);
void bind_project(nanobind::module_ &m);
void bind_project_convexes(nanobind::module_ &m);
void bind_sh(nanobind::module_ &m);
void bind_sort_grid(nanobind::module_ &m);
void bind_ssim(nanobind::module_ &m);

}  // namespace pf
