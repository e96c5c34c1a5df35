package command

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/imagewolf/imagewolf/api/nodeapi"
	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/program"
)

// Exit statuses of 'imagewolf prefetch', beside 0 and 1.
const (
	exitRefused    = 2   // the request is refused as it is; as for a command line that makes no sense
	exitSuperseded = 3   // all are done, but for those where a younger request pulled the tag
	exitTimeout    = 124 // time was up before all had ended; what timeout(1) returns
)

// connectWait is how long a node is tried to be reached.
const connectWait = 5 * time.Second

// exitError is an error that ends the process with a status of its own.
type exitError struct {
	status int
	err    error
}

// Error implements error.
func (e *exitError) Error() string { return e.err.Error() }

// Unwrap returns what happened.
func (e *exitError) Unwrap() error { return e.err }

// ExitStatus returns what the process is to exit with.
func (e *exitError) ExitStatus() int { return e.status }

func nodeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.PathFlag{Name: "socket", EnvVars: []string{"IMAGEWOLF_NODE_API_SOCKET"}, Value: config.Default().NodeAPI.Socket,
			Usage: "`PATH` of a node's socket (node_api.socket)"},
		&cli.BoolFlag{Name: "json", Usage: "print JSON, for machines"},
	}
}

func prefetchCommand() *cli.Command {
	return &cli.Command{
		Name: "prefetch", Usage: "have nodes pull an image before anyone asks for it",
		ArgsUsage: "IMAGE",
		Description: "Prints the request's id, or with --wait a line for each node as it changes.\n" +
			"Exit status: 0 all done (or, without --wait, accepted), 1 some node failed or was canceled, or none was selected,\n" +
			"2 the request is refused as it is, 3 a younger request pulled the tag (not to be repeated), 124 time was up.",
		Flags: append(nodeFlags(),
			&cli.StringFlag{Name: "nodes", Usage: "label `SELECTOR` of the nodes, such as 'zone=a,gpu!=none'; all nodes without one"},
			&cli.UintFlag{Name: "count", Usage: "at most `N` of these nodes"},
			&cli.UintFlag{Name: "percent", Usage: "at most `N` percent of these nodes, rounded up"},
			&cli.BoolFlag{Name: "running", Usage: "only nodes that already have an image of the repository"},
			&cli.StringSliceFlag{Name: "platform", Usage: "pull `PLATFORM`, such as linux/arm64, and not each node's own; may be repeated"},
			&cli.StringFlag{Name: "namespace", Usage: "`NAMESPACE` of containerd; that of each node's prefetch.namespace without one"},
			&cli.StringFlag{Name: "digest", Usage: "pull this `DIGEST`, whatever the tag says"},
			&cli.BoolFlag{Name: "referrers", Usage: "pull what refers to the image, too: signatures, SBOMs"},
			&cli.IntFlag{Name: "priority", Usage: "of two requests that wait on a node the one with the higher `N` goes first"},
			&cli.UintFlag{Name: "concurrency", Usage: "at most `N` nodes pull at the same time"},
			&cli.BoolFlag{Name: "wait", Usage: "wait until all nodes have ended"},
			&cli.DurationFlag{Name: "timeout", Usage: "after this `TIME` nodes give up what has not ended, 1s to 24h", DefaultText: "24h"},
		),
		Subcommands: []*cli.Command{
			{
				Name: "ls", Usage: "list the requests of the last day, the newest first", Before: program.NoArgs,
				Flags: append(nodeFlags(), &cli.UintFlag{Name: "limit", Usage: "list at most `N`, up to 1000", Value: 100}),
				Action: asking(func(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient) error {
					all, err := n.ListPrefetches(ctx, &imagewolfv1.ListPrefetchesRequest{Limit: uint32(min(c.Uint("limit"), 1000))}) //nolint:gosec // bounded here
					if err != nil {
						return told(c, err)
					}
					return printList(c, all)
				}),
			},
			{
				Name: "status", Usage: "show where each node is with a request", ArgsUsage: "ID", Flags: nodeFlags(),
				Action: askingAbout("ID", func(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient, id string) error {
					st, err := n.GetPrefetch(ctx, &imagewolfv1.GetPrefetchRequest{Id: id})
					if err != nil {
						return told(c, err)
					}
					return printStatus(c, st)
				}),
			},
			{
				Name: "cancel", Usage: "end what has not ended of a request; what is pulled stays", ArgsUsage: "ID", Flags: nodeFlags(),
				Action: askingAbout("ID", func(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient, id string) error {
					st, err := n.CancelPrefetch(ctx, &imagewolfv1.CancelPrefetchRequest{Id: id})
					if err != nil {
						return told(c, err)
					}
					return printStatus(c, st)
				}),
			},
		},
		Action: askingAbout("IMAGE", runPrefetch),
	}
}

// oneWord returns the one argument of a command. It reads flags that stand after it,
// where the library sees arguments only.
func oneWord(c *cli.Context, what string) (string, error) {
	var words []string
	rest := c.Args().Slice()
	for len(rest) > 0 {
		words, rest = append(words, rest[0]), rest[1:]
		set := flag.NewFlagSet(c.Command.Name, flag.ContinueOnError)
		set.SetOutput(io.Discard)
		for _, f := range c.Command.Flags {
			for _, name := range f.Names() {
				give := func(v string) error { return c.Set(name, v) }
				if _, isBool := f.(*cli.BoolFlag); isBool {
					set.BoolFunc(name, "", give)
				} else {
					set.Func(name, "", give)
				}
			}
		}
		if err := set.Parse(rest); err != nil {
			return "", program.Usage(c, err)
		}
		rest = set.Args()
	}
	if len(words) != 1 {
		return "", program.Usage(c, fmt.Errorf("%s takes one %s, and was given %d words", c.Command.HelpName, what, len(words)))
	}
	return words[0], nil
}

// askingAbout is asking for a command with one argument.
func askingAbout(what string, do func(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient, word string) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		word, err := oneWord(c, what)
		if c.Bool("help") { // it stood after the word
			return cli.ShowSubcommandHelp(c)
		}
		if err != nil {
			return err
		}
		return asking(func(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient) error { return do(ctx, c, n, word) })(c)
	}
}

// asking runs do with a way to the node.
func asking(do func(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient) error) cli.ActionFunc {
	return func(c *cli.Context) (err error) {
		if path := c.Path("socket"); !filepath.IsAbs(path) {
			return program.Usage(c, fmt.Errorf("--socket: %q is not an absolute path", path))
		}
		n, err := nodeapi.Dial(nodeapi.Options{Addresses: []string{"unix://" + c.Path("socket")}})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.Close()) }()
		return do(c.Context, c, n)
	}
}

// told turns what a node answered into what the user is told.
func told(c *cli.Context, err error) error {
	st := status.Convert(err)
	switch st.Code() {
	case codes.InvalidArgument:
		return &exitError{exitRefused, errors.New(st.Message())}
	case codes.Unavailable:
		return unavailable(c, st.Message())
	}
	return errors.New(st.Message())
}

// unavailable says why nobody answers, or what the node says that cannot answer now.
// The library's text has both among its own.
func unavailable(c *cli.Context, text string) error {
	path := c.Path("socket")
	conn, err := (&net.Dialer{Timeout: connectWait}).DialContext(c.Context, "unix", path)
	var why syscall.Errno
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("this user may not write to %s: node_api.socket_mode and node_api.socket_group say who may", path)
	case errors.As(err, &why):
		return fmt.Errorf("no node answers at %s (%w): is the daemon running, and is that its node_api.socket?", path, why)
	case err == nil:
		_ = conn.Close() // it was to be seen whether it can be made
	}
	if i := strings.LastIndex(text, retried); i >= 0 {
		text = text[i+len(retried):]
	}
	return errors.New(text)
}

// retried stands before what a node said in the text of an error that several tries
// ended with.
const retried = "rpc error: code = Unavailable desc = "

// requestFrom returns what the flags ask for.
func requestFrom(c *cli.Context, image string) (*imagewolfv1.PrefetchRequest, error) {
	small := func(name string) (uint32, error) {
		v := c.Uint(name)
		if v > 1<<31 {
			return 0, fmt.Errorf("--%s: %d is too many", name, v)
		}
		return uint32(v), nil
	}
	r := &imagewolfv1.PrefetchRequest{
		Id: nodeapi.NewID(), Image: image, Digest: c.String("digest"), Platforms: c.StringSlice("platform"), Namespace: c.String("namespace"),
		Referrers: c.Bool("referrers"), Nodes: &imagewolfv1.NodeSelection{Labels: c.String("nodes"), RunningRepository: c.Bool("running")},
	}
	var errs [3]error
	r.Nodes.Count, errs[0] = small("count")
	r.Nodes.Percent, errs[1] = small("percent")
	r.Concurrency, errs[2] = small("concurrency")
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	if p := c.Int("priority"); int64(int32(p)) == int64(p) { //nolint:gosec // that is what is checked
		r.Priority = int32(p) //nolint:gosec // checked
	} else {
		return nil, fmt.Errorf("--priority: %d is out of range", p)
	}
	if c.IsSet("timeout") {
		t := c.Duration("timeout")
		if t < time.Second || t > 24*time.Hour {
			return nil, fmt.Errorf("--timeout: %s is out of range: choose 1s to 24h", t)
		}
		r.TimeoutSeconds = int64((t + time.Second - 1) / time.Second)
	}
	return r, nil
}

// runPrefetch sends the request, and waits if it is asked to.
func runPrefetch(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient, image string) error {
	r, err := requestFrom(c, image)
	if err != nil {
		return &exitError{exitRefused, err}
	}
	st, err := n.Prefetch(ctx, r)
	if err != nil {
		return told(c, err)
	}
	if len(st.Nodes) == 0 {
		return fmt.Errorf("no node is selected: 'imagewolf prefetch' selects by the labels that nodes have in their cluster.labels, and what was asked for fits none")
	}
	if !c.Bool("wait") {
		if c.Bool("json") {
			return printJSON(c, st)
		}
		_, err := fmt.Fprintln(c.App.Writer, st.Request.Id)
		return err
	}
	if st, err = follow(ctx, c, n, st); err != nil {
		return err
	}
	if c.Bool("json") {
		if err := printJSON(c, st); err != nil {
			return err
		}
	}
	return outcome(st)
}

// follow shows a request's nodes until all have ended or the request's time is
// up, and returns the last status. A node that is restarted meanwhile is asked
// again.
func follow(ctx context.Context, c *cli.Context, n imagewolfv1.NodeClient, st *imagewolfv1.PrefetchStatus) (*imagewolfv1.PrefetchStatus, error) {
	limit := 24 * time.Hour
	if s := st.Request.TimeoutSeconds; s > 0 {
		limit = time.Duration(s) * time.Second
	}
	// The nodes end in time by themselves, and get a moment to say so. The call has no
	// deadline, of which gRPC would tell the node: that might end the watch first, and
	// say that it was canceled.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer time.AfterFunc(limit+2*time.Second, func() { cancel(context.DeadlineExceeded) }).Stop()
	show := newDisplay(c, st)
	defer show.close()
	for {
		stream, err := n.WatchPrefetch(ctx, &imagewolfv1.GetPrefetchRequest{Id: st.Request.Id}, grpc.WaitForReady(true))
		for err == nil {
			var next *imagewolfv1.PrefetchStatus
			if next, err = stream.Recv(); err == nil {
				st = next
				show.update(st)
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return st, nil
		case errors.Is(context.Cause(ctx), context.DeadlineExceeded):
			return st, nil
		case ctx.Err() != nil:
			return nil, fmt.Errorf("no longer waiting for %s: it goes on; 'imagewolf prefetch status %s' tells how, and 'cancel' ends it", st.Request.Id, st.Request.Id)
		case status.Code(err) != codes.Unavailable:
			return nil, told(c, err)
		}
		select { // the daemon restarts
		case <-ctx.Done():
		case <-time.After(connectWait / 10):
		}
	}
}

// outcome is what a request's end means for the exit status.
func outcome(st *imagewolfv1.PrefetchStatus) error {
	var failed, canceled, superseded, open []string
	late := false
	for _, n := range st.Nodes {
		switch {
		case n.State == imagewolfv1.PrefetchState_PREFETCH_STATE_DONE:
		case n.Superseded:
			superseded = append(superseded, n.Node)
		case n.State == imagewolfv1.PrefetchState_PREFETCH_STATE_CANCELED:
			canceled = append(canceled, n.Node)
		case n.State == imagewolfv1.PrefetchState_PREFETCH_STATE_FAILED:
			failed = append(failed, n.Node)
			late = late || n.TimedOut
		default:
			open = append(open, n.Node)
		}
	}
	exit, parts := 1, []string(nil)
	say := func(format string, nodes []string) {
		if len(nodes) > 0 {
			parts = append(parts, fmt.Sprintf(format, len(nodes), len(st.Nodes), few(nodes)))
		}
	}
	say("time is up, and %d of %d nodes have not ended: %s", open)
	if late {
		say("time was up before %d of %d nodes were done: %s", failed)
	} else {
		say("%d of %d nodes failed: %s", failed)
	}
	say("canceled on %d of %d nodes: %s", canceled)
	say("superseded on %d of %d nodes: %s: a younger request pulled the tag, and this one again would move it back", superseded)
	switch {
	case len(parts) == 0:
		return nil
	case len(open) > 0 || late:
		exit = exitTimeout
	case len(failed)+len(canceled) == 0:
		exit = exitSuperseded
	}
	return &exitError{exit, errors.New(strings.Join(parts, "; "))}
}

// few names the first of many.
func few(names []string) string {
	const most = 10
	if len(names) > most {
		return oneLine(strings.Join(names[:most], ", ")) + ", …"
	}
	return oneLine(strings.Join(names, ", "))
}

// printJSON prints a message as one line of JSON, by the names of
// api/v1/node.proto.
func printJSON(c *cli.Context, m proto.Message) error {
	b, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.App.Writer, string(b))
	return err
}
