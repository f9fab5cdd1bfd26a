"""A coupling rule of somebody else, for an operator of theirs: Fly scales channels, ``hops`` of them for each group."""

from onnxcompress.coupling import mends, rule


@rule("Fly", domain="com.example")
def fly(node, at):
    x, scale, y = at.data(node), at.data(node, 1), at.output(node)
    at.elementwise(node, [x], y)
    at.same(scale[0], x[-1], node)
    hops = at.virtual(node, "hops", node.attributes.get_int("hops"), "hops")
    each = at.virtual(node, "channels of a hop", x.shape[-1] // at.size(hops))
    at.product([x[-1]], [hops, each], node)


@mends("Fly", domain="com.example")
def fewer_hops(node, mender):
    kept = mender.virtual(node, "hops")
    if kept is not None:
        mender.rewriter.set_attribute(node, "hops", len(kept))
