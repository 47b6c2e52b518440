//! A client that keeps its connection, and whose service may be killed at any moment.

use std::io::{self, BufReader, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use crate::support::{PATIENCE, Response, Service};

pub struct Client {
    address: SocketAddr,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            connection: None,
        }
    }

    /// POSTs JSON and waits for the answer. After an error it connects again.
    pub fn ask(
        &mut self,
        path: &str,
        token: &str,
        key: Option<&str>,
        body: &Value,
    ) -> io::Result<Response> {
        let mut reader = match self.connection.take() {
            Some(reader) => reader,
            None => {
                let stream = TcpStream::connect(self.address)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                BufReader::new(stream)
            }
        };
        let mut headers = vec![("X-Api-Key", token), ("Connection", "keep-alive")];
        headers.extend(key.map(|key| ("Idempotency-Key", key)));
        let request = Service::written("POST", path, &headers, body.to_string().as_bytes());
        reader.get_mut().write_all(&request)?;
        let response = Response::try_next(&mut reader)?;
        if response.header("connection") != Some("close") {
            self.connection = Some(reader);
        }
        Ok(response)
    }
}
