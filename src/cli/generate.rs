//! Manual pages and completions, from the same types that read the command line. Called by
//! `waybill generate`, when a package is built.

use std::fs;
use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;

/// Writes `man1/waybill.1`, a page per subcommand, and `completions/` for bash, zsh and fish.
pub fn generate(folder: &Path) -> anyhow::Result<()> {
    let (pages, completions) = (folder.join("man1"), folder.join("completions"));
    for folder in [&pages, &completions] {
        fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    }
    clap_mangen::generate_to(Cli::command(), &pages)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "waybill", &completions)?;
    }
    Ok(())
}
