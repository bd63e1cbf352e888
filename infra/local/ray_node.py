"""`ray start` for several nodes on one machine that nobody else can reach: `python ray_node.py start FLAGS`.

Ray binds a node's ports to the loopback address if that is the node's address, and takes any other one of the machine
where it can. Its own switch for this, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, refuses to start a second node.
"""

import os

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"  # `up` sets 0, which is for those who use the cluster

from ray._private import services  # Ray reads the variable when it is imported

services.get_node_ip_address = lambda address=None: "127.0.0.1"

if __name__ == "__main__":
    from ray.scripts.scripts import main

    main()
