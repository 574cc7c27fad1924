//! This test program, run again as another process for one function of it.
#![allow(clippy::print_stderr, reason = "what the other process says is shown")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// What the other process is to do; the test that is run again reads it.
pub(crate) const ROLE: &str = "KVFABRIC_TEST_ROLE";

/// A user without rights.
pub(crate) const NOBODY: u32 = 65_534;

/// Another process of this program; killed when dropped.
pub(crate) struct Again {
    pub(crate) child: Child,
    lines: BufReader<ChildStdout>,
}

impl Again {
    /// Runs the test `body` alone, with `role` in its environment.
    pub(crate) fn start(body: &str, role: &str) -> Self {
        Self::start_as(None, body, role)
    }

    /// As another user, if this one may become anyone.
    pub(crate) fn start_as(user: Option<u32>, body: &str, role: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        Self::run(command, body, role, &[])
    }

    /// `command` starts this program, with whatever arguments follow; `told` is in its environment too.
    pub(crate) fn run(mut command: Command, body: &str, role: &str, told: &[(&str, &str)]) -> Self {
        let mut child = command
            .args([body, "--exact", "--nocapture"])
            .env(ROLE, role)
            .envs(told.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The rest of the line that starts with `word`.
    pub(crate) fn expect(&mut self, word: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(
                self.lines.read_line(&mut line).unwrap() > 0,
                "it ended before {word}"
            );
            // The test harness writes without line ends in front of it.
            if let Some(at) = line.find(word) {
                return line[at + word.len()..].trim().to_owned();
            }
        }
    }

    /// Tells it something, and waits for the line that starts with `answer`.
    pub(crate) fn ask(&mut self, line: &str, answer: &str) -> String {
        let input = self.child.stdin.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
        self.expect(answer)
    }

    /// Stops it, and returns once all of its threads stand still.
    pub(crate) fn stop(&self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::STOP).unwrap();
        let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
        assert!(status.stopped(), "{status:?}");
    }

    pub(crate) fn go_on(&self) {
        kill_process(Pid::from_child(&self.child), Signal::CONT).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end; what it still says is shown.
    pub(crate) fn finish(mut self) -> ExitStatus {
        drop(self.child.stdin.take());
        let mut line = String::new();
        while self.lines.read_line(&mut line).unwrap() > 0 {
            eprint!("{line}");
            line.clear();
        }
        self.child.wait().unwrap()
    }
}

impl Drop for Again {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
