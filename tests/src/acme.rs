//! An ACME server on the Internet side: Pebble, and the DNS that it asks, where every name is the
//! entrance node's. Built by Go once, into `target/peers`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::golang::go;
use crate::netns::{CLIENT, ENTRANCE, Net, Process};
use crate::{PATIENCE, peers, target_dir, within};

const VERSION: &str = "v2.8.0";

/// Pebble; it ends when dropped.
pub struct Pebble {
    /// Where its directory is.
    pub directory: String,
    /// Signs the certificate of the ACME server itself.
    pub ca: PathBuf,
    /// Signs the certificates that it issues.
    pub root: PathBuf,
    dir: PathBuf,
    _processes: [Process; 2],
}

impl Pebble {
    /// Starts it on the client host. It asks for challenges on port 80 of the entrance node. The
    /// error says what is missing or went wrong.
    pub fn start(net: &Net) -> Result<Self, String> {
        let programs = built()?;
        let dir = peers::directory(net, "pebble-");
        let address = CLIENT[0];
        let (key, ca) = (dir.join("key.pem"), dir.join("cert.pem"));
        let mut openssl = Command::new("openssl");
        openssl
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=pebble", "-addext", &format!("subjectAltName=IP:{address}")])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&ca);
        let out = openssl.output().map_err(|e| format!("openssl: {e}"))?;
        if !out.status.success() {
            return Err(format!("openssl: {}", String::from_utf8_lossy(&out.stderr)));
        }
        let config = serde_json::json!({ "pebble": {
            "listenAddress": format!("{address}:14000"),
            "managementListenAddress": format!("{address}:15000"),
            "certificate": ca,
            "privateKey": key,
            "httpPort": 80,
            "tlsPort": 443,
        }});
        let file = dir.join("pebble.json");
        std::fs::write(&file, config.to_string()).map_err(|e| format!("{}: {e}", file.display()))?;

        let dns = format!("{address}:8053");
        let mut names = Command::new(programs.join("pebble-challtestsrv"));
        names.args(["-dns01", &dns, "-defaultIPv4", ENTRANCE[0], "-defaultIPv6", ""]);
        names.args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", ""]);
        names.args(["-management", &format!("{address}:8055")]);
        let mut pebble = Command::new(programs.join("pebble"));
        pebble.arg("-config").arg(&file).args(["-dnsserver", &dns]);
        // It makes clients wait and refuses some of their nonces, to try them.
        pebble.env("PEBBLE_VA_NOSLEEP", "1").env("PEBBLE_WFE_NONCEREJECT", "0");
        let processes = [start(net, &mut names, &dir, "dns")?, start(net, &mut pebble, &dir, "pebble")?];

        let root = dir.join("root.pem");
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--noproxy", "*", "--max-time", "5", "--cacert"]).arg(&ca);
        curl.arg(format!("https://{address}:15000/roots/0")).arg("--output").arg(&root);
        let this = Self { directory: format!("https://{address}:14000/dir"), ca, root, dir, _processes: processes };
        let answers = within(PATIENCE, || net.client.run(|| curl.status()).ok()?.success().then_some(()));
        answers.ok_or_else(|| format!("Pebble does not answer:\n{}", this.log()))?;
        Ok(this)
    }

    /// What it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("pebble.log")).unwrap_or_default()
    }
}

fn start(net: &Net, command: &mut Command, dir: &Path, name: &str) -> Result<Process, String> {
    let log = std::fs::File::create(dir.join(format!("{name}.log"))).map_err(|e| format!("{name}'s log: {e}"))?;
    let errors = log.try_clone().map_err(|e| format!("{name}'s log: {e}"))?;
    net.client.spawn(command.stdin(Stdio::null()).stdout(log).stderr(errors)).map_err(|e| format!("{name}: {e}"))
}

/// Where the programs are.
fn built() -> Result<PathBuf, String> {
    let home = target_dir().join("peers").join(format!("pebble-{VERSION}"));
    std::fs::create_dir_all(&home).map_err(|e| format!("{}: {e}", home.display()))?;
    let lock = std::fs::File::create(home.join("lock")).map_err(|e| format!("{}: {e}", home.display()))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|e| format!("flock: {e}"))?;
    let programs = ["pebble", "pebble-challtestsrv"];
    if !programs.iter().all(|program| home.join(program).exists()) {
        eprintln!("==> go install pebble {VERSION} into {} (half a minute)", home.display());
        let packages = programs.map(|program| format!("github.com/letsencrypt/pebble/v2/cmd/{program}@{VERSION}"));
        go(|command| command.env("GOBIN", &home).arg("install").args(packages))?;
    }
    Ok(home)
}
