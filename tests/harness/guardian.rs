//! Removes a lab when the test program that built it is gone, however it went.
//!
//! libtest keeps no record of who uses a shared value last, and runs no destructor of one; a killed program runs none at
//! all. So a process waits at the other end of a pipe that closes with the test program.

use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

/// The waiting process.
#[derive(Debug)]
pub struct Guardian(Mutex<Option<Child>>);

impl Guardian {
    /// Of the lab with this name. Output is inherited: whoever reads the test program's to the end has waited for the
    /// removal, too.
    pub fn of(lab: &str) -> Self {
        let child = Command::new("setsid")
            .args([
                "sh",
                "-c",
                "read -r _; exec \"$0\" lab down --name \"$1\" 2>/dev/null",
            ])
            .args([super::ambidex(), lab])
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell starts");
        Self(Mutex::new(Some(child)))
    }

    /// Ends it without removing the lab.
    pub fn dismiss(&self) {
        if let Some(mut child) = self.0.lock().unwrap().take() {
            // Killed before its end of the pipe closes, so it never gets to the removal.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // A lab that could not be built was removed by its builder.
        self.dismiss();
    }
}
