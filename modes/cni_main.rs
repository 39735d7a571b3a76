//! The chained CNI plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    ambidex::cni::main()
}
