//! What shells offer for command lines, and manual pages.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use clap::Command as Definition;

fn ambidex(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_ambidex"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output.stdout
}

/// Gives a program a script on standard input: what it says, if it accepts it.
fn fed(program: &mut Command, script: &[u8]) -> String {
    let mut child = program
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program:?}: {error}"));
    child.stdin.take().unwrap().write_all(script).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{program:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn is_here(program: &str) -> bool {
    let asked = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output();
    asked.unwrap().status.success()
}

/// What bash offers when the tabulator key is pressed behind these words.
fn offered(script: &[u8], words: &str) -> BTreeSet<String> {
    let mut driver = script.to_vec();
    driver.extend_from_slice(
        format!(
            "\nCOMP_WORDS=({words})\n[[ '{words}' == *' ' ]] && COMP_WORDS+=('')\n\
             COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n\
             function=$(complete -p ambidex | sed -E 's/.*-F ([^ ]+).*/\\1/')\n\
             $function ambidex \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"\n\
             printf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
        )
        .as_bytes(),
    );
    let mut bash = Command::new("bash");
    bash.args(["--norc", "--noprofile"]);
    let said = fed(&mut bash, &driver);
    said.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_command_lines() {
    let script = ambidex(&["completions", "bash"]);
    fed(Command::new("bash").arg("-n"), &script);
    let only = |word: &str| BTreeSet::from([word.to_owned()]);
    assert_eq!(offered(&script, "ambidex ge"), only("get"));
    let get = offered(&script, "ambidex get po");
    assert!(get.contains("pods") && !get.contains("certs"), "{get:?}");
    assert_eq!(offered(&script, "ambidex agent --mode in"), only("inpod"));
    assert_eq!(
        offered(&script, "ambidex undo --no"),
        only("--node"),
        "flags"
    );
    let commands: BTreeSet<String> = ambidex::cli::command()
        .get_subcommands()
        .map(|command| command.get_name().to_owned())
        .collect();
    let all = offered(&script, "ambidex ");
    assert!(all.is_superset(&commands), "{all:?}");
}

#[test]
fn other_shells_accept_their_scripts() {
    for (shell, mark) in [("zsh", "#compdef ambidex"), ("fish", "complete -c ambidex")] {
        let script = ambidex(&["completions", shell]);
        let text = String::from_utf8(script.clone()).unwrap();
        assert!(text.contains(mark), "{shell}: {text}");
        if is_here(shell) {
            fed(Command::new(shell).arg("-n"), &script);
        }
    }
    let wrong = Command::new(env!("CARGO_BIN_EXE_ambidex"))
        .args(["completions", "tcsh"])
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

/// Names of the pages that a command and its own commands should have.
fn pages_of(command: &Definition, name: &str, pages: &mut BTreeSet<String>) {
    pages.insert(format!("{name}.1"));
    for command in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        pages_of(command, &format!("{name}-{}", command.get_name()), pages);
    }
}

#[test]
fn every_command_has_a_manual_page() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("man1");
    ambidex(&["man", "--out", out.to_str().unwrap()]);
    let mut wanted = BTreeSet::new();
    pages_of(&ambidex::cli::command(), "ambidex", &mut wanted);
    let written: BTreeSet<String> = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(written, wanted);
    assert!(written.contains("ambidex-get-pods.1"), "{written:?}");
    let agent = std::fs::read_to_string(out.join("ambidex-agent.1")).unwrap();
    for said in ["verify\\-every", "AMBIDEX_VERIFY_EVERY"] {
        assert!(agent.contains(said), "{agent}");
    }
    // Nothing of who wrote them is in them.
    let again = directory.path().join("again");
    let status = Command::new(env!("CARGO_BIN_EXE_ambidex"))
        .args(["man", "--out", again.to_str().unwrap()])
        .env("AMBIDEX_VERIFY_EVERY", "77s")
        .status();
    assert!(status.unwrap().success());
    for page in &written {
        let read = |directory: &std::path::Path| std::fs::read(directory.join(page)).unwrap();
        assert_eq!(read(&out), read(&again), "{page}");
    }
    let page = ambidex(&["man"]);
    assert_eq!(page, std::fs::read(out.join("ambidex.1")).unwrap());
    let mut lint = Command::new("mandoc");
    lint.args(["-Tlint", "-Wwarning"])
        .args(written.iter().map(|page| out.join(page)));
    let output = lint.output().expect("mandoc");
    let found = String::from_utf8(output.stdout).unwrap();
    // The pages are of a version, not of a day.
    let found: Vec<&str> = found
        .lines()
        .filter(|l| !l.contains("missing date"))
        .collect();
    assert!(found.is_empty(), "{found:#?}");
}
