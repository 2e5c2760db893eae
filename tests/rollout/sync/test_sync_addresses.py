"""The file of addresses that a launcher writes."""

import threading
import time

import pytest

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.servers.discovery import ADMIN_KEY, API_KEY, external_endpoints, read_addresses
from megatron_r1.rollout.sync.group_sender import address_towards
from tests.support.attached import write_addresses

URLS = ["http://node-1:30000", "https://10.0.0.7:1"]


def test_what_is_written_is_read(tmp_path):
    write_addresses(tmp_path / "servers", URLS)
    assert read_addresses(tmp_path / "servers", 2, 0) == URLS


def test_comments_and_empty_lines_do_not_count(tmp_path):
    (tmp_path / "servers").write_text(f"# two nodes\n\n{URLS[0]}  # the first\n{URLS[1]}\n")
    assert read_addresses(tmp_path / "servers", 2, 0) == URLS


def test_servers_that_come_later_are_waited_for_and_half_a_line_is_none(tmp_path):
    file = tmp_path / "servers"

    def launcher() -> None:
        for text in (f"{URLS[0]}\nhttps://10.", "0.0.7:1", "\n"):
            time.sleep(0.2)
            with file.open("a") as opened:
                opened.write(text)

    thread = threading.Thread(target=launcher)
    thread.start()
    try:
        assert read_addresses(file, 2, 20) == URLS
    finally:
        thread.join()


def test_servers_that_do_not_come_are_counted(tmp_path):
    write_addresses(tmp_path / "servers", URLS[:1])
    with pytest.raises(NoRolloutCapacity, match="has 1 of 2 server addresses after 0 s"):
        read_addresses(tmp_path / "servers", 2, 0)


@pytest.mark.parametrize("line", ["node-1:30000", "http://node-1", "http://node-1:3/x", "http://a:1 http://b:1"])
def test_what_is_no_address_is_refused(tmp_path, line):
    (tmp_path / "servers").write_text(line + "\n")
    with pytest.raises(ConfigError, match="must be http://host:port"):
        read_addresses(tmp_path / "servers", 1, 0)
    (tmp_path / "servers").write_text(f"{URLS[0]}\n{URLS[0]}\n")
    with pytest.raises(ConfigError, match="twice"):
        read_addresses(tmp_path / "servers", 1, 0)


def test_the_way_to_a_server_gives_this_machines_address():
    assert address_towards("http://127.0.0.1:30000") == "127.0.0.1"
    with pytest.raises(NoRolloutCapacity, match="no way to it"):
        address_towards("http://no-such-host.invalid:1")


def test_the_configured_file_gives_the_servers_with_the_keys_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY, "user")
    monkeypatch.setenv(ADMIN_KEY, "admin")
    write_addresses(tmp_path / "servers", URLS)
    config = SGLangConfig(servers=2, address_file=str(tmp_path / "servers"), start_timeout_s=1)
    assert config.started_elsewhere and not SGLangConfig().started_elsewhere
    assert external_endpoints(config) == [Endpoint(url, "user", "admin") for url in URLS]
    with pytest.raises(NoRolloutCapacity, match="has 2 of 3"):
        external_endpoints(SGLangConfig(servers=3, address_file=str(tmp_path / "servers"), start_timeout_s=1))
    assert SGLangConfig(servers=256, address_file="f").servers == 256
    with pytest.raises(ConfigError, match="servers=256"):
        SGLangConfig(servers=256)
    with pytest.raises(ConfigError, match="address_file=f: must be empty"):
        SGLangConfig(addresses=URLS, address_file="f")
