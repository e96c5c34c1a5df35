package fanout

import (
	"testing"
	"testing/synctest"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// What no check knows is not kept: nobody knows how much it is.
func TestUnknownFieldsAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		unknown := protowire.AppendBytes(protowire.AppendTag(nil, 1000, protowire.BytesType), make([]byte, 1000))
		in := &imagewolfv1.PrefetchRequest{Id: "x", Image: image, Nodes: &imagewolfv1.NodeSelection{}}
		in.ProtoReflect().SetUnknown(unknown)
		in.Nodes.ProtoReflect().SetUnknown(unknown)
		if _, err := n.Prefetcher().Start(t.Context(), &imagewolfv1.StartRequest{Request: in, Nodes: []string{"a"}, Coordinator: "b"}); err != nil {
			t.Fatal(err)
		}
		answer, err := n.Prefetcher().Report(t.Context(), &imagewolfv1.ReportRequest{Id: "x"})
		if err != nil || proto.Size(answer) > 1000 {
			t.Errorf("%d bytes are kept, %v", proto.Size(answer), err)
		}
	})
}
