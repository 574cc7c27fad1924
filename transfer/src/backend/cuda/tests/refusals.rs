//! What is refused, by whom, and with which reason; and that nobody touches device memory as if it were the host's.

use super::*;
use crate::backend::file::FileOptions;

fn refused(result: kvcache_core::Result<Request>, kind: ErrorKind, named: &[&str]) {
    let Err(error) = result else {
        panic!("accepted: {named:?}");
    };
    assert_eq!(error.kind(), kind, "{error}");
    for name in named {
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
}

/// Plain access to a region of a device is refused, and nothing of it is exported.
#[test]
fn device_memory_is_no_host_memory() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let mut bytes = [0; 8];
    let results = [
        device.write_at(0, &bytes),
        device.read_at(0, &mut bytes),
        device.fill_at(0, 8, 1),
        device.populate(0, 8),
        device.checksum(0, 8).map(drop),
        device.load_u64(0).map(drop),
        device.store_u64(0, 1),
        bed.agent.metadata_of(&[device.id()]).map(drop),
    ];
    for result in results {
        let error = result.unwrap_err();
        let kinds = [ErrorKind::Unsupported, ErrorKind::NotFound];
        assert!(kinds.contains(&error.kind()), "{error}");
    }
    bed.fake.check();
}

#[test]
fn a_file_is_no_local_side() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions {
        create: true,
        len_bytes: Some(4096),
        ..FileOptions::default()
    };
    let file = bed
        .agent
        .open_file(folder.path().join("file"), &options)
        .unwrap();
    let pair = (file.descriptor(0, 4096), device.descriptor(0, 4096));
    let request = bed.request(Write, &[pair], RequestOptions::default());
    refused(request, ErrorKind::Unsupported, &["local side", "a file"]);
}

#[test]
fn what_no_device_does_is_refused_when_the_request_is_made() {
    let bed = Bed::new();
    let (device, _) = bed.device(8192);
    let (host, second) = (bed.host(&[0; 8192]), bed.host(&[0; 8192]));
    let range = |region: &Region| region.descriptor(0, 4096);
    let usual = RequestOptions::default;
    // Host memory on both sides of one pair, the device on one side of another.
    let mixed = [
        (range(&device), range(&host)),
        (range(&second), range(&host)),
    ];
    let named = ["extent 1", "between host memories"];
    refused(
        bed.request(Write, &mixed, usual()),
        ErrorKind::Unsupported,
        &named,
    );
    let mixed = [
        (range(&host), range(&device)),
        (range(&host), range(&second)),
    ];
    let named = ["cannot use both"];
    refused(
        bed.request(Write, &mixed, usual()),
        ErrorKind::Unsupported,
        &named,
    );
    let onto_itself = [(device.descriptor(0, 4096), device.descriptor(4000, 4096))];
    let named = ["copied over themselves", "4000"];
    refused(
        bed.request(Write, &onto_itself, usual()),
        ErrorKind::Invalid,
        &named,
    );
    assert_nothing_copied(&bed);
}

fn assert_nothing_copied(bed: &Bed) {
    let copies = ["cuMemcpyAsync", "cuMemcpyBatchAsync"].map(|call| bed.fake.count(call));
    assert_eq!(copies, [0, 0]);
}

#[test]
fn options_that_no_device_serves_are_refused_when_the_request_is_made() {
    let bed = Bed::new();
    let (device, _) = bed.device(8192);
    let host = bed.host(&[0; 8192]);
    let range = |region: &Region| region.descriptor(0, 4096);
    let usual = RequestOptions::default;
    let checked = RequestOptions {
        checksum: true,
        ..usual()
    };
    let pair = [(range(&host), range(&device))];
    refused(
        bed.request(Write, &pair, checked),
        ErrorKind::Unsupported,
        &["checksums"],
    );
    let elsewhere = RequestOptions {
        backends: vec!["tcp".to_owned()],
        ..usual()
    };
    assert!(bed.request(Write, &pair, elsewhere).is_err());
    let here = RequestOptions {
        backends: vec!["cuda".to_owned()],
        ..usual()
    };
    bed.request(Write, &pair, here).unwrap();
    let told = RequestOptions {
        notification: Some("done".into()),
        ..usual()
    };
    refused(
        bed.request(Write, &pair, told),
        ErrorKind::Invalid,
        &["notification"],
    );
    assert_nothing_copied(&bed);
}

#[test]
fn memory_that_was_freed_while_registered_is_found_out() {
    let bed = Bed::new();
    let (device, address) = bed.device(4096);
    let host = bed.host(&[0; 4096]);
    bed.fake.engine_frees(address);
    let pair = [(host.descriptor(0, 4096), device.descriptor(0, 4096))];
    let named = ["was freed while it was registered"];
    refused(
        bed.request(Write, &pair, RequestOptions::default()),
        ErrorKind::Invalid,
        &named,
    );
    bed.fake.check();
}

#[test]
fn an_agent_without_cuda_registers_no_device_memory() {
    let fake = Fake::new(1);
    let cuda = fake.start();
    let memory = DeviceMemory::allocate_on(&cuda, 0, 4096).unwrap();
    let agent = Agent::builder("plain").build().unwrap();
    let error = agent.register_device(memory).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("built without CUDA"), "{error}");
    drop(cuda);
    fake.check_empty();
}
