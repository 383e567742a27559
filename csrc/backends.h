// The kernels that grouped_gemm can choose from, by name.
#pragma once

#include <string>

#include "dispatch.h"
#include "params.h"

namespace simple_moe {

struct Backend {
  const char* name;
  void (*grouped_gemm)(const GroupedGemm& p, Stream stream);
  bool (*runs_here)();  // On the current device.
  // Never waits for the device and adds in one order for any number of rows: `auto` and
  // batch_invariant=True ask for it.
  bool keeps_all_promises;
  // Whether few rows may go by grouped_gemv in its place, or with a second product's k split: in an
  // order that is fixed, but, unless batch_invariant=True, not the one of more rows.
  bool takes_few_rows_otherwise = false;
  bool wgmma = false;  // Whether its row tiles are to suit wgmma.
};

// "auto" or a name that this device and build have; anything else raises.
const Backend& choose_backend(const Checks& check, const Place& place, const std::string& name,
                              bool batch_invariant);

// A JSON list of the names.
std::string backend_names();

}  // namespace simple_moe
