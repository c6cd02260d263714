//! From the package to the first receipt, on machines of the test's own: by hand as the README shows it, and on many at
//! once over ssh.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::package::package;
use crate::support::host::Host;
use crate::support::servers::{have, root, wait_until};
use crate::support::waybill::{Bench, Certificates, Finished, PATIENCE, Process};
use crate::systemd::{RECEIVER, SENDER, shipped, value, values};

/// The README's commands with the machine that each is for.
fn steps() -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("README.md")).expect("README.md");
    let block = text.split("\n```shell-session\n").nth(1).expect("a block of commands");
    let lines = block.split("\n```").next().unwrap_or_default().lines();
    let steps: Vec<_> = lines
        .map(|line| line.split_once("# ").expect("HOST# COMMAND"))
        .map(|(host, command)| (host.to_owned(), command.to_owned()))
        .collect();
    // After the package, four commands.
    let (packages, commands) = steps.split_at(2);
    assert!(packages.iter().all(|(_, command)| command.starts_with("dpkg -i ")), "{packages:?}");
    assert_eq!(commands.len(), 4, "{commands:?}");
    assert!(text.contains("after `dpkg -i` on both, four commands"));
    steps
}

/// What systemd runs for a shipped unit, as its user and with its credentials, folder and variables.
fn unit(host: &Host, name: &str) -> String {
    let unit = shipped(name);
    let user = value(&unit, "User");
    let folder = format!("/run/credentials/{name}");
    host.ok(&format!("install -d -o {user} -m 500 {folder}"));
    for credential in values(&unit, "LoadCredential") {
        let (name, from) = credential.split_once(':').expect("a name and a path");
        host.ok(&format!("install -o {user} -m 400 {from} {folder}/{name}"));
    }
    let state = value(&unit, "StateDirectory");
    let mut variables = format!("STATE_DIRECTORY=/var/lib/{state}");
    for setting in values(&unit, "Environment") {
        variables += &format!(" {}", setting.replace("%d", &folder));
    }
    let group = value(&unit, "Group");
    let groups = [vec![group.clone()], values(&unit, "SupplementaryGroups")].concat().join(",");
    let command = value(&unit, "ExecStart");
    // Not by runuser, which stays in between: signals are the service's.
    format!("setpriv --reuid {user} --regid {group} --groups {groups} env {variables} {command}")
}

/// runuser hands a SIGTERM on and ends by it; killed, it would leave its child behind.
struct ByRunuser(Process);

impl Drop for ByRunuser {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Settings in the file that the package has put there.
fn configure(host: &Host, side: &str, text: &str) {
    let file = format!("/etc/waybill/{side}.toml");
    host.run_with(&format!("cat > {file}"), text).ok();
    assert_eq!(host.ok(&format!("stat -c '%a %U:%G' {file}")), "640 root:waybill\n");
}

#[test]
fn two_machines_get_from_the_package_to_the_first_receipt_as_the_readme_says() {
    let Some(package) = package() else { return };
    let bench = Bench::new();
    let name = package.file_name().expect("a name").to_str().expect("text");
    fs::copy(package, bench.path(name)).expect("copied");
    let files = Certificates::make_with(&bench.path(""), &["logs.example.com"], |_| {});
    fs::rename(files.certificate, bench.path("chain.pem")).expect("renamed");
    fs::rename(files.key, bench.path("key.pem")).expect("renamed");
    let Some(logs) = Host::start(&bench.path(""), None) else { return };
    let web = Host::start(&bench.path(""), None).expect("as the first");
    logs.connect(&web);
    web.ok("echo 10.99.0.1 logs.example.com >> /etc/hosts");
    // What dpkg did on this machine before is no part of the test.
    web.ok("true > /var/log/dpkg.log");
    // The authority is one that the sender's machine trusts.
    let prelude = "cd /mnt; export SSL_CERT_FILE=/tmp/ca.pem; ";
    web.ok("install -m 644 /mnt/ca.pem /tmp/ca.pem");

    let mut running: Option<ByRunuser> = None;
    let mut token = String::new();
    let mut last = String::new();
    for (host, command) in steps() {
        let command = command.replace("waybill_0.1.0-1_amd64.deb", name);
        let host = if host == "logs" { &logs } else { &web };
        if let Some(command) = command.strip_suffix(" &") {
            logs.ok("install -g waybill -m 640 /mnt/chain.pem /mnt/key.pem /etc/waybill");
            let receiver = host.start_process("receiver", command, &bench.path("receiver.log"));
            receiver.wait_for_log(" listening");
            running = Some(ByRunuser(receiver));
            continue;
        }
        let done = host.run_with(&format!("{prelude}{command}"), &token).ok();
        if command.contains("waybill token") {
            token.clone_from(&done.stdout);
        }
        last = done.stdout;
    }
    let written = web.ok("wc -l < /var/log/dpkg.log").trim().parse::<usize>().expect("a number");
    assert!(written > 0, "dpkg logged nothing");
    assert_eq!(last.lines().count(), written, "{last}");
    assert!(last.lines().all(|line| line.contains("\"verdict\":\"stored\"")), "{last}");
    let search = |words: &str| {
        let script = format!("runuser -u waybill -- waybill search --limit 10000 '{words}'");
        // Nothing found is no success.
        logs.run(&script).stdout
    };
    assert!(search("status installed waybill").contains("/var/log/dpkg.log"));
    // And what `check` says there.
    let to = "--to wss://logs.example.com:8443/ --token-file /etc/waybill/token";
    let said = web.ok(&format!("{prelude}waybill check send /var/log/dpkg.log {to}"));
    assert!(said.contains("ok    token "), "{said}");

    // Root itself takes nothing away from the service.
    let root = web.run(&format!("{prelude}waybill send /var/log/dpkg.log --once {to}"));
    assert_eq!(root.status.code(), Some(1), "{}", root.stderr);
    assert!(root.stderr.contains("/var/lib/waybill belongs to user "), "{}", root.stderr);
    let tokens = "--tokens /etc/waybill/tokens.toml";
    let root = logs.run(&format!("waybill receive --listen 127.0.0.1:0 {tokens}"));
    assert!(root.stderr.contains("/var/lib/waybill belongs to user "), "{}", root.stderr);
    for host in [&logs, &web] {
        assert_eq!(host.ok("find /var/lib/waybill ! -user waybill"), "");
    }

    // The services go on where the commands ended.
    drop(running);
    configure(
        &logs,
        "receive",
        "listen = '0.0.0.0:8443'\ntls_cert = 'chain.pem'\ntls_key = 'key.pem'\ntokens = 'tokens.toml'\n",
    );
    configure(
        &web,
        "send",
        "to = ['wss://logs.example.com:8443/']\n[[source]]\nfiles = '/var/log/dpkg.log'\n",
    );
    let log = bench.path("receive-service.log");
    let mut receiver = logs.start_process(RECEIVER, &unit(&logs, RECEIVER), &log);
    receiver.wait_for_log(" listening");
    let script = format!("env SSL_CERT_FILE=/tmp/ca.pem {}", unit(&web, SENDER));
    let mut sender = web.start_process(SENDER, &script, &bench.path("send-service.log"));
    web.ok("echo 'from the service' >> /var/log/dpkg.log");
    wait_until("the service's line is stored", PATIENCE, || {
        search("from the service").lines().count() == 1
    });
    assert!(sender.stop().success());
    assert!(receiver.stop().success());
    // What had its receipt before was not sent again.
    assert!(sender.log().contains("stored=1 already=0"), "{}", sender.log());
    assert_eq!(search("").lines().count(), written + 1);
}

/// A machine with Debian's sshd on a port of its own, which root may enter with the key of the bench.
fn sshd(bench: &Bench, neighbour: &Host, port: u16) -> (Host, Process) {
    let host = Host::start(&bench.path(""), Some(neighbour)).expect("as the first");
    let key = format!("/etc/ssh/waybill_test_{port}");
    host.ok(&format!("mkdir -p /run/sshd && ssh-keygen -q -t ed25519 -N '' -f {key}"));
    let options = [
        format!("-p {port} -h {key} -f /dev/null -o PidFile=none -o ListenAddress=127.0.0.1"),
        "-o AuthorizedKeysFile=/mnt/key.pub -o StrictModes=no -o PermitRootLogin=yes".to_owned(),
        "-o PasswordAuthentication=no -o UsePAM=no".to_owned(),
    ]
    .join(" ");
    let log = bench.path(&format!("sshd-{port}.log"));
    let process = host.start_process("sshd", &format!("/usr/sbin/sshd -D -e {options}"), &log);
    process.wait_for_log("Server listening on 127.0.0.1");
    (host, process)
}

/// `scripts/install-many` on the receiver's machine, with these arguments.
fn install(logs: &Host, arguments: &str) -> Finished {
    logs.run(&format!(
        "cd /mnt && WAYBILL=/mnt/program scripts/install-many --tokens tokens.toml --config send.toml \
         --ssh-option IdentityFile=/mnt/key --ssh-option StrictHostKeyChecking=accept-new {arguments}"
    ))
}

#[track_caller]
fn says(finished: &Finished, code: i32, words: &[&str]) {
    let text = format!("{}\n{}", finished.stdout, finished.stderr);
    assert_eq!(finished.status.code(), Some(code), "{text}");
    for word in words {
        assert!(finished.stdout.contains(word), "no {word:?} in\n{text}");
    }
}

#[test]
fn many_machines_are_installed_in_one_command_and_one_that_fails_stops_no_other() {
    let Some(package) = package() else { return };
    if !have("sshd", "openssh-server") {
        return;
    }
    let bench = Bench::new();
    fs::copy(package, bench.path("waybill.deb")).expect("copied");
    fs::copy(env!("CARGO_BIN_EXE_waybill"), bench.path("program")).expect("copied");
    fs::create_dir(bench.path("scripts")).expect("a folder");
    fs::copy(root().join("scripts/install-many"), bench.path("scripts/install-many"))
        .expect("copied");
    // The user of the service reads what lies here.
    fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).expect("chmod");
    bench.write(
        "send.toml",
        "to = [\"ws://127.0.0.1:7700/\"]\ntoken_file = \"token\"\n[[source]]\nfiles = \"/var/log/app/*.log\"\n",
    );
    let Some(logs) = Host::start(&bench.path(""), None) else { return };
    logs.ok("ssh-keygen -q -t ed25519 -N '' -f /mnt/key");
    logs.ok("waybill=/mnt/program; $waybill token first --tokens /mnt/tokens.toml > /dev/null");
    let (first, _sshd) = sshd(&bench, &logs, 2201);
    let (second, _other) = sshd(&bench, &logs, 2202);
    for (host, name) in [(&first, "first"), (&second, "second")] {
        host.ok(&format!("mkdir -p /var/log/app && echo 'of {name}' > /var/log/app/app.log"));
    }
    let receive = "/mnt/program receive --listen 127.0.0.1:7700 --tokens /mnt/tokens.toml --store /mnt/store.sqlite";
    let _receiver = logs.start_process("receiver", receive, &bench.path("receiver.log"));
    wait_until("the receiver listens", PATIENCE, || {
        logs.run("echo > /dev/tcp/127.0.0.1/7700").status.success()
    });

    // The first has an entry and its token is lost; the second is new; on the third port nobody answers.
    let hosts = "root@127.0.0.1:2201=first 127.0.0.1:2202=second 127.0.0.1:2203=third";
    let done = install(&logs, &format!("--deb waybill.deb {hosts}"));
    says(&done, 1, &["2203=third", "FAILED: ssh: connect to host 127.0.0.1 port 2203"]);
    says(&done, 1, &["program, send.toml, token replaced", "program, send.toml, new token"]);
    says(&done, 1, &["3 hosts: 2 installed, 0 unchanged, 1 failed", "run it with:"]);
    let tokens = fs::read_to_string(bench.path("tokens.toml")).expect("tokens");
    assert!(tokens.contains("\"second\"") && !tokens.contains("\"third\""), "{tokens}");
    assert_eq!(first.ok("stat -c '%a %U:%G' /etc/waybill/token"), "640 root:waybill\n");
    let token = first.ok("cat /etc/waybill/token");
    assert_ne!(token, second.ok("cat /etc/waybill/token"));
    assert!(!format!("{}{}", done.stdout, done.stderr).contains(token.trim()), "a token is shown");

    // Nothing is left to do, and nothing is done.
    let hosts = "root@127.0.0.1:2201=first 127.0.0.1:2202=second";
    let done = install(&logs, &format!("--parallel 1 --deb waybill.deb {hosts}"));
    says(&done, 0, &["2 hosts: 0 installed, 2 unchanged, 0 failed"]);
    assert_eq!(fs::read_to_string(bench.path("tokens.toml")).expect("tokens"), tokens);
    // What differs is mended, alone; what the check finds wrong is told.
    second.ok("echo '# changed' >> /etc/waybill/send.toml");
    first.ok("chmod 700 /var/log/app");
    let done = install(&logs, &format!("--deb waybill.deb {hosts}"));
    says(&done, 1, &["2202=second", "installed: send.toml", "1 installed, 0 unchanged, 1 failed"]);
    says(&done, 1, &["FAILED: fail  source", "cannot be listed"]);
    first.ok("chmod 755 /var/log/app");

    // As the service would run, each under its own name.
    for host in [&first, &second] {
        let send = "runuser -u waybill -- env STATE_DIRECTORY=/var/lib/waybill \
                    waybill send --config /etc/waybill/send.toml --once";
        host.ok(send);
    }
    let found = logs.ok("/mnt/program search --json --store /mnt/store.sqlite of");
    for name in ["first", "second"] {
        let line = found.lines().find(|line| line.contains(&format!("\"of {name}\"")));
        let sender = format!("\"sender_name\":\"{name}\"");
        assert!(line.is_some_and(|line| line.contains(&sender)), "{found}");
    }

    // A token that was revoked stays so.
    logs.ok("/mnt/program token second --tokens /mnt/tokens.toml --revoke");
    let done = install(&logs, &format!("--deb waybill.deb {hosts}"));
    says(&done, 1, &["FAILED: the token of second is revoked", "1 unchanged, 1 failed"]);
    without_a_package(&logs, &second, Path::new("/opt/fourth"));
    with_chain_keys(&bench, &logs, &first);
}

/// By the binary alone, into a folder of its own.
fn without_a_package(logs: &Host, host: &Host, prefix: &Path) {
    let arguments = "--binary program --prefix '/opt/%s' 127.0.0.1:2202=fourth";
    let done = install(logs, arguments);
    says(&done, 0, &["installed: program, send.toml, new token"]);
    let prefix = prefix.display();
    host.ok(&format!("{prefix}/bin/waybill --version"));
    assert_eq!(host.ok(&format!("stat -c %a {prefix}/etc/token")), "600\n");
    says(&install(logs, arguments), 0, &["unchanged; run it with: /opt/fourth/bin/waybill"]);
}

/// A token that is there is replaced by one with a key; what is lost of the two comes back, alone.
fn with_chain_keys(bench: &Bench, logs: &Host, host: &Host) {
    let config = fs::read_to_string(bench.path("send.toml")).expect("the configuration");
    bench.write("chained.toml", format!("chain_key_file = 'chain.key'\n{config}"));
    let arguments = "--chain --config chained.toml --deb waybill.deb 127.0.0.1:2201=first";
    let done = install(logs, arguments);
    says(&done, 0, &["installed: send.toml, token replaced, chain.key"]);
    let key = host.ok("cat /etc/waybill/chain.key");
    assert_eq!(host.ok("stat -c '%a %U:%G' /etc/waybill/chain.key"), "640 root:waybill\n");
    assert!(!format!("{}{}", done.stdout, done.stderr).contains(key.trim()), "a key is shown");
    let tokens = fs::read_to_string(bench.path("tokens.toml")).expect("tokens");
    assert!(tokens.contains(&format!("chain_key = \"{}\"", key.trim())), "{tokens}");
    says(&install(logs, arguments), 0, &["1 hosts: 0 installed, 1 unchanged, 0 failed"]);
    host.ok("rm /etc/waybill/chain.key");
    says(&install(logs, arguments), 0, &["installed: chain.key;"]);
    host.ok("echo wb_lost > /etc/waybill/token");
    says(&install(logs, arguments), 0, &["installed: token replaced;"]);
    assert_eq!(host.ok("cat /etc/waybill/chain.key"), key);

    let send = "echo 'with a key' >> /var/log/app/app.log && \
                runuser -u waybill -- env STATE_DIRECTORY=/var/lib/waybill \
                waybill send --config /etc/waybill/send.toml --once";
    host.ok(send);
    logs.ok("/mnt/program search --store /mnt/store.sqlite 'with a key'");
    let arguments = "--chain --config chained.toml --binary program --prefix '/opt/%s' \
                     127.0.0.1:2201=fifth";
    let done = install(logs, arguments);
    says(&done, 0, &["installed: program, send.toml, new token, chain.key"]);
    says(&install(logs, arguments), 0, &["unchanged; run it with: /opt/fifth/bin/waybill"]);
}
