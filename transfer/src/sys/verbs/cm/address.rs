//! IP addresses, as the system has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ptr::NonNull;

use kvcache_core::{Error, Result};

/// An address in the form that system calls take.
pub(super) fn to_raw(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: a structure of numbers, for all of which zero is a value.
    let mut raw: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let place = &raw mut raw;
    match address {
        SocketAddr::V4(address) => {
            let form = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(address.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is as large and as aligned as every kind of address needs.
            unsafe { place.cast::<libc::sockaddr_in>().write(form) };
        }
        SocketAddr::V6(address) => {
            let form = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: address.ip().octets(),
                },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { place.cast::<libc::sockaddr_in6>().write(form) };
        }
    }
    raw
}

/// The address of an interface; none if it is of another kind than IP.
fn of_raw(raw: NonNull<libc::sockaddr>) -> Option<SocketAddr> {
    // SAFETY: an address of the system's list, which has a family at least.
    let family = unsafe { raw.as_ref() }.sa_family;
    match i32::from(family) {
        libc::AF_INET => {
            // SAFETY: by its family.
            let form = unsafe { raw.cast::<libc::sockaddr_in>().as_ref() };
            let ip = Ipv4Addr::from(form.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(form.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: by its family.
            let form = unsafe { raw.cast::<libc::sockaddr_in6>().as_ref() };
            let ip = Ipv6Addr::from(form.sin6_addr.s6_addr);
            let (port, scope) = (u16::from_be(form.sin6_port), form.sin6_scope_id);
            Some(SocketAddrV6::new(ip, port, form.sin6_flowinfo, scope).into())
        }
        _ => None,
    }
}

/// The addresses of this machine's interfaces that others can be told: neither loopback nor of one link alone.
///
/// # Errors
/// What the system says.
pub(crate) fn local_addresses() -> Result<Vec<IpAddr>> {
    let mut first = std::ptr::null_mut();
    // SAFETY: the result is writable; the list is given back below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        let cause = std::io::Error::last_os_error();
        return Err(Error::io("ask for the addresses of interfaces", cause));
    }
    let (mut all, mut next) = (Vec::new(), NonNull::new(first));
    while let Some(entry) = next {
        // SAFETY: an entry of the list, which is not given back yet.
        let entry = unsafe { entry.as_ref() };
        next = NonNull::new(entry.ifa_next);
        let ip = NonNull::new(entry.ifa_addr).and_then(of_raw);
        let ip = ip.map(|address| address.ip());
        all.extend(ip.filter(|ip| match ip {
            IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
        }));
    }
    // SAFETY: got above, given back once; nothing of it is kept.
    unsafe { libc::freeifaddrs(first) };
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both kinds, there and back, with all that they have.
    #[test]
    fn addresses_keep_their_parts() {
        let scoped = SocketAddrV6::new("fe80::7".parse().unwrap(), 9, 0, 3);
        for address in [
            "10.9.0.1:4791".parse().unwrap(),
            "[fd00::7]:1".parse().unwrap(),
            scoped.into(),
        ] {
            let mut raw = to_raw(address);
            let back = of_raw(NonNull::from(&mut raw).cast());
            assert_eq!(back, Some(address));
        }
    }

    /// None of this machine's addresses is one that only itself knows.
    #[test]
    fn own_addresses_are_those_that_others_can_be_told() {
        let all = local_addresses().unwrap();
        assert!(
            all.iter()
                .all(|ip| !ip.is_loopback() && !ip.is_unspecified()),
            "{all:?}"
        );
    }
}
