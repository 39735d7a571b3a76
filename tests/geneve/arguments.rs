//! The command line that test programs have.

/// What a caller of the test program wants.
#[derive(Debug, Default)]
pub struct Arguments {
    /// Name the tests instead of running them.
    pub list: bool,
    /// Print nothing but what was asked for.
    pub terse: bool,
    /// Parts of names; no part means every test.
    wanted: Vec<String>,
    /// Parts of names of tests to leave out.
    skipped: Vec<String>,
    /// The parts are whole names.
    exact: bool,
    /// Only tests that are ignored by default: there are none.
    ignored_only: bool,
}

/// libtest's options that take a value and mean nothing here.
const WITH_VALUE: [&str; 5] = [
    "--test-threads",
    "--logfile",
    "--color",
    "-Z",
    "--shuffle-seed",
];

impl Arguments {
    /// Understands libtest's arguments; unknown options are as good as none, since none changes what is tested.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Self {
        let mut arguments = Self::default();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--list" => arguments.list = true,
                "--exact" => arguments.exact = true,
                "--ignored" => arguments.ignored_only = true,
                "-q" | "--quiet" | "--format=terse" => arguments.terse = true,
                "--format" => arguments.terse |= words.next().as_deref() == Some("terse"),
                "--skip" => arguments.skipped.extend(words.next()),
                option if WITH_VALUE.contains(&option) => drop(words.next()),
                option if option.starts_with('-') => {
                    let skipped = option.strip_prefix("--skip=");
                    arguments.skipped.extend(skipped.map(str::to_owned));
                }
                _ => arguments.wanted.push(word),
            }
        }
        arguments
    }

    /// Whether a test is to run.
    pub fn wants(&self, name: &str) -> bool {
        let is_meant = |part: &String| {
            if self.exact {
                name == part
            } else {
                name.contains(part)
            }
        };
        let wanted = self.wanted.is_empty() || self.wanted.iter().any(is_meant);
        wanted && !self.skipped.iter().any(is_meant) && !self.ignored_only
    }
}
