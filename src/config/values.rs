//! Values as people write them: sizes, durations, addresses, networks, statuses; pure. An error says what to write
//! instead. Whoever reports it puts the setting and the value before it.
//!
//! Not here: which of these values a setting allows ([`super`]).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

/// The name that stands for this machine's own address, without a look-up.
const LOCALHOST: &str = "localhost";

/// A number of bytes. K, M and G stand for powers of 1024, as KiB, MiB and GiB do; kB, MB and GB for powers of 1000.
pub fn size<T: TryFrom<u64>>(text: &str) -> Result<T, &'static str> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "kb" => 1000,
        "mb" => 1000 * 1000,
        "gb" => 1000 * 1000 * 1000,
        _ => return Err(A_SIZE),
    };
    if number.is_empty() {
        return Err(A_SIZE);
    }
    // Nothing but digits, so it can only be too large.
    let bytes = number
        .parse()
        .ok()
        .and_then(|number: u64| number.checked_mul(factor));
    let bytes = bytes.and_then(|bytes| T::try_from(bytes).ok());
    bytes.ok_or("that is more than this machine can count: give fewer bytes")
}

const A_SIZE: &str = "give bytes, as a whole number or like 64KiB or 1M";

/// How many of something.
pub fn count<T: FromStr>(text: &str) -> Result<T, &'static str> {
    text.parse().map_err(|_| "give a whole number")
}

/// Whether something is on. An empty text is as good as none.
pub fn switch(text: &str) -> Result<bool, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "on" | "1" => Ok(true),
        "false" | "f" | "no" | "n" | "off" | "0" | "" => Ok(false),
        _ => Err("give true or false"),
    }
}

/// A port.
pub fn port(text: &str) -> Result<u16, &'static str> {
    text.parse().map_err(|_| "give a port from 0 to 65535")
}

/// A status that is a final answer, in the widest sense that clients accept.
pub fn final_status(text: &str) -> Result<u16, &'static str> {
    let status = text.parse().ok();
    let is_final = |status: &u16| (200..=999).contains(status);
    status
        .filter(is_final)
        .ok_or("give a status from 200 to 999")
}

/// A time span, with units.
pub fn duration(text: &str) -> Result<Duration, &'static str> {
    humantime::parse_duration(text)
        .map_err(|_| "give a time with its unit, like 30s, 15m, 24h or 7d")
}

/// An address to listen on.
pub fn address(text: &str) -> Result<IpAddr, &'static str> {
    match text.eq_ignore_ascii_case(LOCALHOST) {
        true => Ok(Ipv4Addr::LOCALHOST.into()),
        false => text.parse().map_err(|_| {
            "give localhost or another IP address of this machine, or 0.0.0.0 to be reached from others"
        }),
    }
}

/// An address and a port to listen on.
pub fn socket_address(text: &str) -> Result<SocketAddr, &'static str> {
    let local = text.rsplit_once(':').and_then(|(name, port)| {
        let port = name
            .eq_ignore_ascii_case(LOCALHOST)
            .then(|| port.parse().ok());
        Some(SocketAddr::from((Ipv4Addr::LOCALHOST, port??)))
    });
    local.or_else(|| text.parse().ok()).ok_or(
        "give an IP address and a port, like 127.0.0.1:8081, or 0.0.0.0:8081 to be reached from other machines",
    )
}

/// A network or a single address. One that has more bits than its mask is not guessed at.
pub fn network(text: &str) -> Result<IpNet, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    let network: IpNet = text
        .parse()
        .map_err(|_| "give a network like 192.168.1.0/24, several with commas")?;
    if network != network.trunc() {
        return Err(format!(
            "give {} for the whole network, or {} for that address alone",
            network.trunc(),
            IpNet::from(network.addr())
        ));
    }
    Ok(network)
}

/// The statuses that are meant by one, like 503, or by their class, like 5xx. Only 300 to 599 can be failures.
pub fn statuses(text: &str) -> Result<RangeInclusive<u16>, &'static str> {
    let all = 300..=599;
    let meant = match text.to_ascii_lowercase().as_str() {
        "3xx" => Some(300..=399),
        "4xx" => Some(400..=499),
        "5xx" => Some(500..=599),
        one => one.parse().ok().map(|one| one..=one),
    };
    meant
        .filter(|meant| all.contains(meant.start()))
        .ok_or("only 300 to 599 can be failures: give statuses like 429, or classes like 5xx")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("4096 B", 4096),
            ("1k", 1024),
            ("64KiB", 64 << 10),
            ("64 kib", 64 << 10),
            ("1M", 1 << 20),
            ("1MiB", 1 << 20),
            ("1MB", 1_000_000),
            ("2G", 2 << 30),
            ("007kB", 7000),
        ] {
            assert_eq!(size::<u64>(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "M", "-1", "+1", "1.5M", "1,5", "1T", "1 M B", "0x10", "1e6", "K1", "١",
        ] {
            assert_eq!(size::<u64>(text), Err(A_SIZE), "{text}");
        }
        assert!(size::<u64>("18446744073709551616").is_err());
        assert!(size::<u64>("18446744073709551615").is_ok());
        assert!(size::<u32>("4G").is_err(), "as on a machine of 32 bits");
    }

    #[test]
    fn localhost_is_an_address_to_listen_on() {
        for (text, shown) in [
            ("localhost", "127.0.0.1"),
            ("LocalHost", "127.0.0.1"),
            ("::", "::"),
        ] {
            assert_eq!(address(text).unwrap().to_string(), shown);
        }
        assert_eq!(
            socket_address("localhost:81").unwrap().to_string(),
            "127.0.0.1:81"
        );
        assert_eq!(socket_address("[::1]:81").unwrap().to_string(), "[::1]:81");
        for text in ["", "localhost.", "box.lan", "127.0.0.1:80", "127.1"] {
            assert!(address(text).is_err(), "{text}");
        }
        for text in [
            "",
            "localhost",
            "localhost:",
            "localhost:65536",
            ":81",
            "::1:81x",
            "box.lan:81",
        ] {
            assert!(socket_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_network_with_more_bits_than_its_mask_is_refused_with_both_readings() {
        for (text, whole, alone) in [
            ("192.168.1.7/24", "192.168.1.0/24", "192.168.1.7/32"),
            ("10.0.0.1/0", "0.0.0.0/0", "10.0.0.1/32"),
            ("fd00::7/8", "fd00::/8", "fd00::7/128"),
        ] {
            let error = network(text).unwrap_err();
            let expected =
                format!("give {whole} for the whole network, or {alone} for that address alone");
            assert_eq!(error, expected);
            assert!(network(whole).is_ok() && network(alone).is_ok());
        }
    }

    #[test]
    fn statuses_are_given_one_by_one_or_by_class() {
        assert_eq!(statuses("503"), Ok(503..=503));
        assert_eq!(statuses("5xx"), Ok(500..=599));
        assert_eq!(statuses("4XX"), Ok(400..=499));
        for text in [
            "", "2xx", "200", "299", "600", "50x", "5x", "xx", "5xxx", "-503", "٥xx",
        ] {
            assert!(statuses(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*") {
            let _ = (size::<usize>(&text), count::<u64>(&text), switch(&text), port(&text), duration(&text));
            let _ = (address(&text), socket_address(&text));
            if let Ok(network) = network(&text) {
                prop_assert_eq!(network, network.trunc());
            }
            if let Ok(statuses) = statuses(&text) {
                prop_assert!(statuses.clone().all(|status| (300..=599).contains(&status)));
                prop_assert!(!statuses.is_empty());
            }
        }

        #[test]
        fn a_size_is_its_number_times_its_unit(
            number in any::<u64>(),
            (unit, factor) in prop::sample::select(vec![
                ("", 1), ("K", 1024), ("MiB", 1 << 20), ("g", 1 << 30), ("kB", 1000), ("mb", 1_000_000),
            ]),
            gap in " {0,2}",
        ) {
            let read = size::<u64>(&format!("{number}{gap}{unit}")).ok();
            prop_assert_eq!(read, number.checked_mul(factor));
        }

        #[test]
        fn the_readings_that_a_network_is_refused_with_are_what_it_can_mean(
            address in any::<IpAddr>(),
            prefix in 0_u8..=128,
        ) {
            let prefix = if address.is_ipv4() { prefix % 33 } else { prefix };
            let given = IpNet::new(address, prefix).unwrap();
            match network(&given.to_string()) {
                Ok(network) => prop_assert_eq!(network, given.trunc()),
                Err(message) => {
                    let readings: Vec<_> = message.split(' ').filter_map(|word| network(word).ok()).collect();
                    prop_assert_eq!(readings, [given.trunc(), IpNet::from(address)]);
                }
            }
        }
    }
}
