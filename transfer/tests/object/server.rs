//! A real S3 server: a process that ends with its test.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvfabric_transfer::{ObjectOptions, Secret};

use super::{ACCESS_KEY, PATIENCE, SECRET_KEY};

/// `s3s-fs` over a directory with one bucket.
pub(crate) struct Server {
    child: Arc<Mutex<Child>>,
    pub(crate) address: SocketAddr,
    root: Arc<tempfile::TempDir>,
}

impl Drop for Server {
    fn drop(&mut self) {
        kill(&self.child);
    }
}

fn kill(child: &Mutex<Child>) {
    let mut child = child.lock().expect("child");
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

fn find() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("KVFABRIC_S3_SERVER") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join("s3s-fs"))
        .find(|file| file.is_file())
}

impl Server {
    /// Starts one; none, said aloud, where it is not installed.
    pub(crate) fn start() -> Option<Self> {
        if find().is_none() {
            eprintln!("SKIPPED: no s3s-fs on PATH or in KVFABRIC_S3_SERVER, S3 is not tested");
            return None;
        }
        let root = tempfile::tempdir().expect("directory");
        std::fs::create_dir(root.path().join("bucket")).expect("bucket");
        Some(Self::over(Arc::new(root)))
    }

    fn over(root: Arc<tempfile::TempDir>) -> Self {
        let program = find().expect("found before");
        // The port is free again for a moment before the server takes it: another may come first, so try again.
        for _ in 0..5 {
            let address = {
                let listener = TcpListener::bind("127.0.0.1:0").expect("port");
                listener.local_addr().expect("address")
            };
            let mut child = Command::new(&program)
                .args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY])
                .args(["--host", "127.0.0.1"])
                .args(["--port", &address.port().to_string()])
                .arg(root.path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("the server starts");
            let until = Instant::now() + PATIENCE;
            while Instant::now() < until && child.try_wait().expect("status").is_none() {
                if TcpStream::connect(address).is_ok() {
                    return Self {
                        child: Arc::new(Mutex::new(child)),
                        address,
                        root,
                    };
                }
                std::thread::yield_now();
            }
            // Nobody else would.
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("{} does not come up", program.display());
    }

    /// Another process over the same directory.
    pub(crate) fn again(&self) -> Self {
        Self::over(Arc::clone(&self.root))
    }

    /// Kills the process when called.
    pub(crate) fn killer(&self) -> Box<dyn FnOnce() + Send> {
        let child = Arc::clone(&self.child);
        Box::new(move || kill(&child))
    }

    /// Where it keeps everything.
    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// Files that belong to uploads in parts.
    pub(crate) fn parts(&self) -> usize {
        let entries = std::fs::read_dir(self.root()).expect("root");
        let names =
            entries.filter_map(|entry| entry.expect("entry").file_name().into_string().ok());
        names.filter(|name| name.contains("upload")).count()
    }
}

/// How a server at this address is reached.
pub(crate) fn options(address: SocketAddr) -> ObjectOptions {
    ObjectOptions {
        endpoint: Some(format!("http://{address}")),
        region: Some("us-east-1".to_owned()),
        access_key: Some(ACCESS_KEY.to_owned()),
        secret_key: Some(Secret::new(SECRET_KEY)),
        allow_http: true,
        retries_max: 1,
        ..ObjectOptions::default()
    }
}
