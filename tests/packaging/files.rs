//! The files of the packages that are made from the declaration of the command line: completions, man pages and
//! `/etc/default/export-service`.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use export_service::config::Cli;

const NAME: &str = "export-service";

/// Writes all of them into this folder, for a service that is started by this unit.
pub fn write(folder: &Path, unit: &str) -> io::Result<()> {
    let (completions, pages) = (folder.join("completions"), folder.join("man"));
    for folder in [&completions, &pages] {
        fs::create_dir_all(folder)?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), NAME, &completions)?;
    }
    clap_mangen::generate_to(Cli::command(), &pages)?;
    fs::write(folder.join("default"), default_file(unit))
}

/// `/etc/default/export-service`: every variable of `serve` with what it is if nobody sets it, commented out.
pub fn default_file(unit: &str) -> String {
    let mut text = String::from(
        "# Settings of export-service. Take the # away before a name, change the value, and run
#   systemctl restart export-service
# \"export-service-ctl serve --check\" shows the settings in force.
",
    );
    for argument in serve().get_arguments() {
        let Some(variable) = argument.get_env().filter(|_| !argument.is_hide_set()) else {
            continue;
        };
        let variable = variable.to_string_lossy();
        let help = argument.get_help().unwrap_or_default();
        text += &format!("\n# {help}\n");
        if argument.is_hide_env_values_set() {
            text += &format!(
                "# {variable} belongs into /etc/export-service.env, which only root can read.\n"
            );
            continue;
        }
        let by_unit = unit
            .lines()
            .find_map(|line| line.strip_prefix(&format!("Environment={variable}=")));
        if variable == "EXPORT_DATA_DIR" {
            text += "# EXPORT_DATA_DIR is the unit's. To have it on another disk, mount that at \
                     /var/lib/private/export-service.\n";
            continue;
        }
        let defaults = argument.get_default_values();
        let default = defaults.first().map(|value| value.to_string_lossy());
        let value = by_unit.unwrap_or(default.as_deref().unwrap_or_default());
        text += &format!("#{variable}={value}\n");
    }
    text
}

/// The declaration of `serve`.
pub fn serve() -> Command {
    let mut command = Cli::command();
    command.build();
    let serve = command.find_subcommand("serve");
    serve.expect("the service can be run").clone()
}
